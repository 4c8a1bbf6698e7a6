"""CIFAR-10's batch files as published: their names, their MD5s, where they lie, and how to read them. Without
torch, so that a thread can read them while the rest of the program is still importing it: `read_ahead`.

They lie in `data.root`/cifar-10-batches-py. Whoever names that folder itself, or one above or below, means
the same files, which their MD5s tell for certain.

The MD5 is that of the very bytes that are unpickled, and nothing is unpickled before it is known to be right.
torchvision's `CIFAR10` reads the same files, but importing it loads its model zoo too.

https://www.cs.toronto.edu/~kriz/cifar.html; the MD5s are those that torchvision lists.
"""

import contextlib
import hashlib
import io
import mmap
import os
import pickle
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"

TRAIN = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
TEST = {"test_batch": "40351d587109b95175f43aff81a1287e"}
META = {"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"}
_MAX_FILE_BYTES = 1 << 26  # twice a batch


_ahead: dict[Path, Future["Cifar10Arrays | None"]] = {}


@dataclass(frozen=True, eq=False)
class Cifar10Arrays:
    """Both splits: images (N, 3, 32, 32) uint8 and labels (N,) int64."""

    train_images: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]


def batch_folders(root: Path) -> Iterator[Path]:
    """Yield the folders at `root`, just above or below, that hold a file of every name; none is opened."""
    return (folder for folder in _places(root) if not missing_files(folder))


def begun_folders(root: Path) -> Iterator[Path]:
    """Yield the folders in these places that hold at least one file of such a name."""
    return (folder for folder in _places(root) if len(missing_files(folder)) < len((*TRAIN, *TEST, *META)))


def archives(root: Path) -> Iterator[Path]:
    """Yield the files of the archive's name at `root`, just above or just below."""
    candidates = (folder / ARCHIVE for folder in (root, _above(root), *_folders_in(root)))
    return (archive for archive in candidates if _is_file(archive))


def missing_files(folder: Path) -> list[str]:
    """Return the names of the files that are not in a folder of batches."""
    return [name for name in (*TRAIN, *TEST, *META) if not _is_file(folder / name)]


def download_root(root: Path) -> Path:
    """Return where the folder of batches is to be made: beside itself where `root` has its very name."""
    return root.parent if root.name == FOLDER else root


def _places(root: Path) -> Iterator[Path]:
    """In the order in which they are tried: as documented, the folder itself, above, below."""
    yield from (root / FOLDER, root, _above(root) / FOLDER)
    for folder in _folders_in(root):
        yield from (folder / FOLDER, folder)


def _above(root: Path) -> Path:
    return root.parent if root.name else root / ".."


def _folders_in(root: Path) -> list[Path]:
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.name[0] != "." and entry.is_dir()]
        return [root / name for name in sorted(names) if name != FOLDER]
    return []


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long, or a folder that may not be entered
        return False


def read_ahead(folder: Path) -> None:
    """Begin to read a folder of batches in a thread, for the next `read_arrays` of the same folder.

    Without memory enough for that, they are read again, then.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    _ahead[folder] = pool.submit(_read, folder)
    pool.shutdown(wait=False)


def is_whole(folder: Path) -> bool:
    """Whether all files have their MD5s; what was read for this stays for the next `read_arrays`."""
    if folder not in _ahead:
        read_ahead(folder)
    try:
        return _ahead[folder].result() is not None
    except (OSError, KeyError, ValueError, pickle.UnpicklingError, MemoryError):
        return False


def read_arrays(folder: Path, *, only_train: bool = False) -> Cifar10Arrays | None:
    """Both splits from a folder of batches; None where a file is missing or has another MD5.

    With `only_train` the test split is empty, unless it was read ahead.

    Raises:
        OSError, KeyError, ValueError, pickle.UnpicklingError: when a file cannot be read.
    """
    begun = _ahead.pop(folder, None)
    if begun is not None:
        with contextlib.suppress(MemoryError):
            found = begun.result()
            if found is not None:  # else they may have been put there since
                return found
    return _read(folder, only_train=only_train)


def is_read_ahead(folder: Path) -> bool:
    """Whether `read_arrays` has little left to do, and the memory is taken already."""
    return folder in _ahead


def _read(folder: Path, *, only_train: bool = False) -> Cifar10Arrays | None:
    if missing_files(folder):
        return None
    sizes = [(folder / name).stat().st_size for name in (*TRAIN, *TEST, *META)]
    if max(sizes) > _MAX_FILE_BYTES:  # of the name, but no batch
        return None
    # One piece for all files, which goes back to the system: new pages would take as long as the reading,
    # and what a thread frees elsewhere stays with it (training peaked 100 MiB higher).
    memory = mmap.mmap(-1, max(1, *sizes))
    ((name, md5),) = META.items()
    size = _read_into(memory, folder / name, md5)
    if size is None:
        return None
    class_names = tuple(name.decode() for name in _unpickled(memory[:size])[b"label_names"])
    train = _read_split(memory, folder, TRAIN)
    test = None if train is None else _read_split(memory, folder, {} if only_train else TEST)
    return None if train is None or test is None else Cifar10Arrays(*train, *test, class_names)


def _read_split(
    memory: mmap.mmap, folder: Path, files: Mapping[str, str]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]] | None:
    """The batches one behind the other; None as above."""
    labels: list[int] = []
    images = np.empty((0, 3, 32, 32), np.uint8)
    for name, md5 in files.items():
        size = _read_into(memory, folder / name, md5)
        if size is None:
            return None
        start, end = _longest_string(memory, size)
        pixels = np.frombuffer(memory, np.uint8, end - start, start).reshape(-1, 3, 32, 32)
        if not labels:  # all batches are of one size
            images = np.empty((len(files) * len(pixels), 3, 32, 32), np.uint8)
        images[len(labels) : len(labels) + len(pixels)] = pixels
        # the same with an empty string in its place, for which the array is not made
        labels += _unpickled(memory[: start - 5] + b"U\x00" + memory[end:size])[b"labels"]
    return images, np.array(labels, np.int64)


def _read_into(memory: mmap.mmap, file: Path, md5: str) -> int | None:
    """Put the bytes of a file into memory; their number, or None with another MD5."""
    with file.open("rb", buffering=0) as opened:
        size = 0
        while more := opened.readinto(memoryview(memory)[size:]):
            size += more
    # against damage, not forgery
    digest = hashlib.md5(memoryview(memory)[:size], usedforsecurity=False)
    return size if digest.hexdigest() == md5 else None


def _longest_string(memory: mmap.mmap, size: int) -> tuple[int, int]:
    """Where the one string is that makes up most of a pickle, the pixels: no copy of it is needed.

    Raises:
        ValueError: there is none.
    """
    opcode = memory.find(pickle.BINSTRING, 0, size)
    while opcode >= 0:
        start = opcode + 5  # behind the length, four bytes
        length = int.from_bytes(memory[opcode + 1 : start], "little")
        if size // 2 < length <= size - start:
            return start, start + length
        opcode = memory.find(pickle.BINSTRING, opcode + 1, size)
    raise ValueError("no pixels in it")


def _unpickled(content: bytes) -> dict[bytes, Any]:
    entry: dict[bytes, Any] = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    return entry


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct":
            return lambda *_: _NoArray()
        if (module, name) == ("numpy", "dtype"):
            # two more arguments are its defaults, but as integers, of which numpy 2.4 warns
            return lambda code, *_: np.dtype(code)
        return super().find_class(module, name)


class _NoArray:
    """In place of the array of pixels."""

    def __setstate__(self, state: object) -> None:
        """Take in nothing."""
