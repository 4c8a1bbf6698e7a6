"""Your own images: root/{train,test}/CLASS/*.{png,jpg,jpeg,webp}, torchvision's ImageFolder layout.

Classes are the folders' names in sorted order; files in
folders below a class belong to it, in sorted order. Names that begin with a dot are skipped (.DS_Store,
.ipynb_checkpoints). Images are decoded once into the cache, see `bncli.data.imagecache`, or whenever they are
asked for, see `bncli.data.streamed`, where they are too many for that.

Which folders are the training and the test split is found without opening a file. `data.root` is the folder
above `train` and `test`. Others call the second one `val`, `validation` or `valid`; a `test` without class
folders in it (images without labels, as in ImageNet and on Kaggle) is none for us. Whoever names ROOT/train
instead of ROOT means the same. Images directly in `train`, without class folders, have no labels; they are
both splits, for what needs no labels. Anything else is not guessed, but named.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bncli.config import ImageFolderConfig
from bncli.data.dataset import Dataset, Progress, Split
from bncli.data.decode import Fit, decode_file
from bncli.data.fingerprint import content_of, digest_dataset, digest_splits, is_of_listing
from bncli.data.imagecache import (
    ImageFile,
    Known,
    cached_images,
    decoded_images,
    default_cache,
    known_images,
    note_digest,
)
from bncli.data.memory import SPARE, address_space_left
from bncli.data.streamed import Sample, StreamedSplit
from bncli.data.user_path import user_path
from bncli.errors import DataError, NoTestSplitError
from bncli.indexed import NO_LABEL, InMemory
from bncli.wording import gigabytes, plural

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")  # in any case
MAX_CACHED = 4_000_000_000  # bytes of decoded images
TRAIN = "train"
TEST_NAMES = ("test", "val", "validation", "valid")  # the first that has class folders

# what others call them, in lower case, and we do not take for sure
_LIKE_TRAIN = {"train", "training", "trn", "train_set", "trainset"}
_LIKE_TEST = {"test", "testing", "tests", "val", "validation", "valid", "eval", "dev", "test_set", "testset"}
_SHOWN = 5  # names of folders in a message


def find_splits(root: Path, *, only_train: bool = False) -> tuple[Path, str]:
    """Return the folder above the splits, and the name of the test split in it: train for one without labels.

    With `only_train` no test split is looked for, and the name is train.

    Raises:
        DataError: a split is missing; it says what is there instead.
    """
    try:
        root = _above_splits(root)
        if not (root / TRAIN).is_dir():
            raise DataError(f"{_no_split(root, TRAIN)}; {_instead_of_train(root)}")
        return root, TRAIN if only_train or _is_unlabelled(root / TRAIN) else _test_name(root)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise DataError(f"data.root: {str(root)!r} cannot be listed: {error}") from error


def class_names(split: Path) -> tuple[str, ...]:
    """Return the names of the class folders, sorted; those that begin with a dot are none.

    Raises:
        OSError: the folder cannot be listed.
    """
    with os.scandir(split) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()))


def fit_of(config: ImageFolderConfig) -> Fit:
    """How its images become squares."""
    return Fit(config.image_size, config.resize, config.interpolation)


def layout(root: Path) -> str:
    """Say what is expected."""
    return f"expected {root}/{{train,test}}/CLASS/*.png (or .jpg, .jpeg, .webp)"


def _above_splits(root: Path) -> Path:
    """Return the folder itself, or the one above where it is one of the splits."""
    name = root.name or root.absolute().name
    above = root.parent if root.name else root.absolute().parent
    is_split = name in {TRAIN, *TEST_NAMES} and not (root / TRAIN).is_dir()
    return above if is_split and (above / TRAIN).is_dir() else root


def _is_unlabelled(split: Path) -> bool:
    """Whether images lie in it directly, and no class folders."""
    return not class_names(split) and bool(_walk(split, split.name, ()))


def _test_name(root: Path) -> str:
    there = [name for name in TEST_NAMES if (root / name).is_dir()]
    usable = [name for name in there if class_names(root / name)]
    if "test" in usable or len(usable) == 1:
        return usable[0]
    if usable:
        raise DataError(
            f"{root}: {' and '.join(usable)} may each be the test split; rename the one that you mean to test"
        )
    if there:  # what is wrong with it is said where it is listed
        return there[0]
    alike = [name for name in class_names(root) if name.lower() in _LIKE_TEST]
    raise NoTestSplitError(
        f"{_no_split(root, 'test')}, nor {', '.join(TEST_NAMES[1:])}; "
        + (
            f"rename {alike[0]} to test"
            if alike
            else f"put images that are not trained on into {root}/test/CLASS (data.root is {root})"
        )
    )


def _no_split(root: Path, name: str) -> str:
    return f"{root / name}: no such folder ({layout(root)})"


def _instead_of_train(root: Path) -> str:
    """What to do, by what is there."""
    if not root.is_dir():
        return f"there is no folder {root}: set data.root (--data-root) to the folder above train"
    names = class_names(root)
    for place in (*(root / name for name in names), root.absolute().parent):
        if (place / TRAIN).is_dir() and any((place / name).is_dir() for name in TEST_NAMES):
            return f"set data.root={place}"
    for name in names:
        if name.lower() in _LIKE_TRAIN:
            return f"rename {name} to train"
    if not names:
        return f"there are no folders in {root}: set data.root (--data-root) to the folder above train"
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return (
        f"{root} holds {shown}: if these are the classes, move them into {root / TRAIN} and a part of the"
        f" images into {root}/test; else set data.root (--data-root) to the folder above train"
    )


_checked: dict[ImageFolderConfig, Dataset] = {}


@dataclass(frozen=True)
class _Listing:
    """The files of one split, in order, with their labels."""

    name: str  # of its folder
    classes: tuple[str, ...]  # none: all labels are NO_LABEL
    files: list[ImageFile]
    labels: list[int]

    def identity(self) -> bytes:
        """Tells the files from others by their names and sizes."""
        listed = "".join(f"{file.path}\0{file.size}\n" for file in self.files)
        return hashlib.sha256(os.fsencode(listed)).digest()


def load_image_folder(
    config: ImageFolderConfig, progress: Progress | None = None, *, only_train: bool = False
) -> Dataset:
    """Load the images, each made a square of `config.image_size` pixels as `decode` says.

    With `only_train` the test split is not even looked for, and the training images are both splits.

    Raises:
        DataError: a folder is missing or empty, the splits have different classes, an image is broken,
            or the cache cannot be written.
    """
    checked = _checked.pop(config, None)
    if checked is not None:
        return checked
    root, train, test = _list_splits(config, only_train=only_train)
    why = _why_streamed(config, train, test)
    if why is not None:
        return _streamed(config, root, train, test, why)
    images = [
        cached_images(root, split.name, split.files, fit_of(config), _cache_folder(config), progress)
        for split in _different(train, test)
    ]
    notes = () if only_train else _notes_of(root, train)
    return replace(_dataset_of(images, train, test), notes=notes)


def _different(train: _Listing, test: _Listing) -> list[_Listing]:
    """The splits, or the one that is both."""
    return [train] if test is train else [train, test]


def _why_streamed(config: ImageFolderConfig, train: _Listing, test: _Listing) -> str | None:
    """The reason why images are decoded whenever they are asked for; None: they are cached."""
    if config.stream != "auto":
        return "as asked for" if config.stream else None
    num_images = sum(len(split.files) for split in _different(train, test))
    needed = num_images * 3 * config.image_size**2
    if needed > MAX_CACHED:
        return f"the cache would take {gigabytes(needed)}"
    available = address_space_left()
    if available is not None and needed + SPARE > available:
        return f"ulimit -v leaves no room for {gigabytes(needed)} of them"
    return None


def _streamed(config: ImageFolderConfig, root: Path, train: _Listing, test: _Listing, why: str) -> Dataset:
    def stream(listing: _Listing) -> StreamedSplit:
        return StreamedSplit(
            _FileReader(root, listing, fit_of(config)),
            len(listing.files),
            labels=torch.tensor(listing.labels, dtype=torch.int64) if listing.classes else None,
            are_labelled=bool(listing.classes),
            identity=listing.identity(),
            num_workers=config.workers,
        )

    note = f"images are decoded whenever they are used, as {why}; --set data.stream=false keeps them"
    notes = (note,) if config.stream == "auto" else ()
    splits = [stream(split) for split in _different(train, test)]
    return Dataset("imagefolder", splits[0], splits[-1], train.classes, notes + _notes_of(root, train))


def _notes_of(root: Path, train: _Listing) -> tuple[str, ...]:
    if train.classes:
        return ()
    return (f"{root / TRAIN} has no class folders: its images have no labels, and are both splits",)


class _FileReader:
    """Decodes images by their number; as small as the files' names, which every worker has."""

    def __init__(self, root: Path, listing: _Listing, fit: Fit) -> None:
        names = [os.fsencode(file.path) for file in listing.files]
        self._names = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])
        self._labels = np.array(listing.labels, np.int64)
        self._root, self._fit = root, fit

    def __call__(self, number: int) -> Sample:
        """Decode one image."""
        name = self._names[self._ends[number] : self._ends[number + 1]]
        return decode_file(self._root / os.fsdecode(name), self._fit), int(self._labels[number])


def check_digest(
    config: ImageFolderConfig, digest: str, classes: tuple[str, ...], progress: Progress | None = None
) -> None:
    """Check that the images and labels in `config.root` are those with this digest.

    Where they are not, nothing is written; and no image is opened where the classes are others. What was
    read for it stays for the next `load_image_folder` of the same configuration.

    Raises:
        DataError: they are others, or there are none.
    """
    root, test_name = find_splits(user_path(config.root, "data.root"))
    try:
        found = [class_names(root / split) for split in (TRAIN, test_name)]
    except OSError as error:
        raise DataError(f"cannot be listed: {error}") from error
    if found != [classes, classes]:
        raise DataError("it has other classes")
    root, train, test = _list_splits(config)
    why = _why_streamed(config, train, test)
    if why is not None or is_of_listing(digest):
        streamed = _streamed(config, root, train, test, why or "")
        if is_of_listing(digest):
            found_digest = digest_dataset(streamed)
        else:
            found_digest = _digest_files(root, train, test, fit_of(config), progress)
        _require_same(found_digest, digest)
        if why is not None:
            _checked[config] = streamed
        return
    fit, cache = fit_of(config), _cache_folder(config)

    def look_up() -> list[Known]:
        found = (known_images(root, split.name, split.files, fit, cache) for split in (train, test))
        return [one for one in found if one is not None]

    known = look_up()
    if len(known) < 2:
        found_digest = _digest_files(root, train, test, fit, progress)
    elif known[0].digest is not None and known[0].digest == known[1].digest:
        found_digest = known[0].digest  # over both splits: where both note it, both are its images
    else:
        found_digest = digest_dataset(_dataset_of([one.images for one in known], train, test))
    _require_same(found_digest, digest)
    images = [cached_images(root, split.name, split.files, fit, cache, progress) for split in (train, test)]
    _checked[config] = _dataset_of(images, train, test)
    for one in look_up():
        note_digest(one, digest)


def _require_same(found: str, digest: str) -> None:
    if found != digest:
        raise DataError(
            "it has other images or labels than those that the network was trained on (by their SHA-256)"
        )


def _cache_folder(config: ImageFolderConfig) -> Path:
    return default_cache() if config.cache is None else user_path(config.cache, "data.cache")


def _dataset_of(images: list[torch.Tensor], train: _Listing, test: _Listing) -> Dataset:
    splits: list[InMemory] = [
        Split(pixels, torch.tensor(split.labels, dtype=torch.int64))
        if split.classes
        else InMemory(pixels, None)
        for pixels, split in zip(images, _different(train, test), strict=True)
    ]
    return Dataset("imagefolder", splits[0], splits[-1], train.classes)


def _digest_files(root: Path, train: _Listing, test: _Listing, fit: Fit, progress: Progress | None) -> str:
    """What `digest_dataset` would say, image by image: nothing is kept of them."""
    splits = (
        content_of(
            (len(split.files), 3, fit.image_size, fit.image_size),
            decoded_images(root, split.name, split.files, fit, progress),
            split.labels,
        )
        for split in (train, test)
    )
    return digest_splits(train.classes, splits)


def list_images(folder: Path) -> list[str]:
    """Return the paths of the images in a folder, at any depth, sorted by folder and then by name.

    Raises:
        DataError: the folder holds none, or cannot be listed.
    """
    try:
        found = sorted(_walk(folder, str(folder), ()))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error}") from error
    if not found:
        raise DataError(f"{folder}: no images ({', '.join(EXTENSIONS)}) in it")
    return [file.path for _, file in found]


def _list_splits(config: ImageFolderConfig, *, only_train: bool = False) -> tuple[Path, _Listing, _Listing]:
    """Return the folder above the splits, and both."""
    root, test_name = find_splits(user_path(config.root, "data.root"), only_train=only_train)
    train = _list_split(root, TRAIN)
    test = train if test_name == TRAIN else _list_split(root, test_name)
    _check_same_classes(root, train, test, test_name)
    return root, train, test


def _list_split(root: Path, split: str) -> _Listing:
    folder = root / split
    try:
        names = class_names(folder)
        if not names and split == TRAIN:
            unlabelled = [file for _, file in sorted(_walk(folder, split, ()))]
            if unlabelled:
                return _Listing(split, (), unlabelled, [NO_LABEL] * len(unlabelled))
        if not names:
            loose = sum(path.suffix.lower() in EXTENSIONS for path in folder.iterdir())
            what = (
                f"{plural(loose, 'image')} in it, but no class folders" if loose else "no class folders in it"
            )
            raise DataError(f"{folder}: {what}; {layout(root)}")
        files: list[ImageFile] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            found = [file for _, file in sorted(_walk(folder / name, f"{split}/{name}", ()))]
            if not found:
                fix = "put some there, or remove the folder from both splits"
                raise DataError(f"{folder / name}: no images ({', '.join(EXTENSIONS)}) in it; {fix}")
            files += found
            labels += [label] * len(found)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error}") from error
    return _Listing(split, names, files, labels)


def _walk(folder: Path, relative: str, above: tuple[tuple[int, int], ...]) -> list[tuple[str, ImageFile]]:
    """Find the images at any depth, each with its folder: torchvision sorts by that before the name."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that contains it
        return []
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if name.lower().endswith(EXTENSIONS) and entry.is_file():
                info = entry.stat()
                file = ImageFile(f"{relative}/{name}", info.st_size, info.st_mtime_ns, info.st_ctime_ns)
                found.append((relative, file))
            elif entry.is_dir():
                found += _walk(folder / name, f"{relative}/{name}", (*above, here))
    return found


def _check_same_classes(root: Path, train: _Listing, test: _Listing, test_name: str) -> None:
    problems = [
        f"{root / split} has no folder {', '.join(missing)}"
        for split, missing in (
            (TRAIN, sorted(set(test.classes) - set(train.classes))),
            (test_name, sorted(set(train.classes) - set(test.classes))),
        )
        if missing
    ]
    if problems:
        fix = "both need the same class folders: add or rename them"
        raise DataError(f"{' and '.join(problems)}; {fix}")
