"""Which folders of a tree of images are the training and the test split; no file is opened.

`data.root` is the folder above `train` and `test`. Others call the second one `val`, `validation` or `valid`;
a `test` without class folders in it (images without labels, as in ImageNet and on Kaggle) is none for us.
Whoever names ROOT/train instead of ROOT means the same. Anything else is not guessed, but named.
"""

import os
from pathlib import Path

from bncli.errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")  # in any case
TRAIN = "train"
TEST_NAMES = ("test", "val", "validation", "valid")  # the first that has class folders

# what others call them, in lower case, and we do not take for sure
_LIKE_TRAIN = {"train", "training", "trn", "train_set", "trainset"}
_LIKE_TEST = {"test", "testing", "tests", "val", "validation", "valid", "eval", "dev", "test_set", "testset"}
_SHOWN = 5  # names of folders in a message


def find_splits(root: Path) -> tuple[Path, str]:
    """Return the folder above the splits, and the name of the test split in it.

    Raises:
        DataError: a split is missing; it says what is there instead.
    """
    try:
        root = _above_splits(root)
        if not (root / TRAIN).is_dir():
            raise DataError(f"{_no_split(root, TRAIN)}; {_instead_of_train(root)}")
        return root, _test_name(root)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise DataError(f"data.root: {str(root)!r} cannot be listed: {error}") from error


def class_names(split: Path) -> tuple[str, ...]:
    """Return the names of the class folders, sorted; those that begin with a dot are none.

    Raises:
        OSError: the folder cannot be listed.
    """
    with os.scandir(split) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()))


def layout(root: Path) -> str:
    """Say what is expected."""
    return f"expected {root}/{{train,test}}/CLASS/*.png (or .jpg, .jpeg, .webp)"


def _above_splits(root: Path) -> Path:
    """Return the folder itself, or the one above where it is one of the splits."""
    name = root.name or root.absolute().name
    above = root.parent if root.name else root.absolute().parent
    is_split = name in {TRAIN, *TEST_NAMES} and not (root / TRAIN).is_dir()
    return above if is_split and (above / TRAIN).is_dir() else root


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
    raise DataError(
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
        return f"there is no folder {root}: set data.root to the folder above train"
    names = class_names(root)
    for place in (*(root / name for name in names), root.absolute().parent):
        if (place / TRAIN).is_dir() and any((place / name).is_dir() for name in TEST_NAMES):
            return f"set data.root={place}"
    for name in names:
        if name.lower() in _LIKE_TRAIN:
            return f"rename {name} to train"
    if not names:
        return f"there are no folders in {root}: set data.root to the folder above train"
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return (
        f"{root} holds {shown}: if these are the classes, move them into {root / TRAIN} and a part of the"
        f" images into {root}/test; else set data.root to the folder above train"
    )
