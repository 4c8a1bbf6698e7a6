"""The decoded images of a folder, on disk, keyed by content; the next run maps the file into memory.

Two levels, so that starting is quick and an edit is never missed:

1. FOLDER-SIZE.json, one for each split of an image folder, remembers the manifest (every file's path, size
   and times), the content key it had and, where it was asked for, the digest of the whole data set. While
   the manifest is the same, no file is opened.
2. Otherwise all files are read and hashed. CONTENT.npy holds the pixels for that content key, so files
   that were only touched, copied or moved as a whole are not decoded again.

Files appear whole or not at all (temporary file, fsync, rename). Nothing in the folder is ever needed: it
may be deleted at any time; entries that no run used for 90 days are removed when another is written.

Damaged files are made again, and no code in one is executed. But an entry is trusted to be what bncli wrote:
whoever may write into the folder can change the pixels, as whoever may write into the images' own folder.
"""

import hashlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from bncli.atomic_file import atomic_file
from bncli.data import decode
from bncli.data.dataset import Progress
from bncli.data.memory import require_address_space
from bncli.errors import DataError

_T = TypeVar("_T")
_KEPT_SECONDS = 90 * 24 * 3600
_MAX_POINTER_BYTES = 4096
_KEY = re.compile(r"[0-9a-f]{64}")
_ENTRY = re.compile(r"[0-9a-f]{64}\.npy")
_POINTER = re.compile(r"[0-9a-f]{32}-\d+\.json")
_CHUNK = 512  # files at a time: bounds the memory, and how often progress is told


class ImageFile(NamedTuple):
    """A file as the directory listing shows it; `path` is relative to the root, with slashes."""

    path: str
    size: int  # bytes
    mtime_ns: int
    ctime_ns: int  # also changes where a copy keeps the modification time


def default_cache() -> Path:
    """Return $XDG_CACHE_HOME/bncli, or ~/.cache/bncli."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bncli"


def cached_images(
    root: Path,
    split: str,
    files: list[ImageFile],
    fit: decode.Fit,
    folder: Path,
    progress: Progress | None = None,
) -> Tensor:
    """Return the decoded images (N, 3, image_size, image_size) uint8, in the order of `files`.

    The files are those of the folder `split` in `root`. The tensor is a private copy-on-write view of the
    cache file: writing to it changes no file.

    Raises:
        DataError: a file cannot be read or decoded, or the cache cannot be written.
    """
    shape = (len(files), 3, fit.image_size, fit.image_size)
    require_address_space(
        math.prod(shape),
        what=f"data: mapping {len(files):,} images of {fit.image_size}x{fit.image_size} pixels",
        fix="raise the limit, or set data.image_size lower",
    )
    manifest, pointer = _manifest(files), _pointer(root / split, fit, folder)
    note = _remembered(pointer, manifest)
    images = None if note is None else _map(_entry(pointer, note), shape)
    if note is not None and images is not None:
        _touch(pointer, _entry(pointer, note))
        return images
    hashes = _hash_files(root, split, files, progress)
    named = (f"{file.path}\0{digest}\n" for file, digest in zip(files, hashes, strict=True))
    content = _digest(itertools.chain([f"bncli images {decode.VERSION} {fit}\n"], named))
    entry = folder / f"{content}.npy"
    images = _map(entry, shape)
    if images is None:
        pixels = _decode_files(root, split, files, hashes, fit, progress)
        _evict(folder)
        with _written(entry) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for image in pixels:
                file.write(image)
        images = _map(entry, shape)
    if images is None:
        raise DataError(f"data.cache: {entry} was written, but cannot be read back")
    with _written(pointer) as file:
        file.write(json.dumps({"manifest": manifest, "content": content}).encode())
    return images


class Known(NamedTuple):
    """What is cached of files that have not changed since."""

    images: Tensor  # as of `cached_images`
    digest: str | None  # of the data set; None: not noted yet
    pointer: Path
    note: dict[str, str]  # what stands in it


def known_images(
    root: Path, split: str, files: list[ImageFile], fit: decode.Fit, folder: Path
) -> Known | None:
    """Return what `cached_images` would, where no file needs to be opened for it; None elsewhere."""
    pointer = _pointer(root / split, fit, folder)
    note = _remembered(pointer, _manifest(files))
    images = (
        None if note is None else _map(_entry(pointer, note), (len(files), 3, fit.image_size, fit.image_size))
    )
    if note is None or images is None:
        return None
    return Known(images, note.get("dataset"), pointer, note)


def note_digest(known: Known, digest: str) -> None:
    """Note the data set's digest beside what is cached of it, which spares reading all of it the next time.

    A cache that may only be read stays as it is.
    """
    _touch(known.pointer, _entry(known.pointer, known.note))
    if known.digest != digest:
        with suppress(OSError), atomic_file(known.pointer) as file:
            file.write(json.dumps({**known.note, "dataset": digest}).encode())


def decoded_images(
    root: Path, split: str, files: list[ImageFile], fit: decode.Fit, progress: Progress | None = None
) -> Iterator[bytes]:
    """Yield each image's pixels, (3, image_size, image_size) uint8, in order; the cache plays no part.

    Raises:
        DataError: a file cannot be read or decoded.
    """
    return _decode_files(root, split, files, None, fit, progress)


def _entry(pointer: Path, note: dict[str, str]) -> Path:
    return pointer.parent / f"{note['content']}.npy"


def _manifest(files: list[ImageFile]) -> str:
    return _digest(f"{path}\0{size} {mtime} {ctime}\n" for path, size, mtime, ctime in files)


def _pointer(split: Path, fit: decode.Fit, folder: Path) -> Path:
    return folder / f"{_digest([str(split.resolve())])[:32]}-{fit}.json"


def _digest(parts: Iterable[str]) -> str:
    # names need not be valid UTF-8; one encoding of the whole is far quicker than 60,000
    return hashlib.sha256(os.fsencode("".join(parts))).hexdigest()


def _remembered(pointer: Path, manifest: str) -> dict[str, str] | None:
    """Return what the last run noted, if the manifest is the same; a damaged file means nothing."""
    try:
        if not pointer.is_file():  # nobody may be writing into a pipe
            return None
        with pointer.open("rb") as file:
            found = json.loads(file.read(_MAX_POINTER_BYTES))
        if found["manifest"] != manifest or not _KEY.fullmatch(found["content"]):
            return None
        keys = [key for key in ("manifest", "content", "dataset") if isinstance(found.get(key), str)]
        return {key: found[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _map(entry: Path, shape: tuple[int, ...]) -> Tensor | None:
    """Map a cache entry into memory; None if it is missing or damaged, then it is made again."""
    try:
        if not entry.is_file() or _first_bytes(entry) != np.lib.format.MAGIC_PREFIX:
            return None
        pixels = np.load(entry, mmap_mode="c", allow_pickle=False)
    except Exception:  # numpy evaluates the header as a literal, which may go wrong in many ways
        return None
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != shape:
        return None
    return torch.from_numpy(pixels) if pixels.flags.c_contiguous else None


def _first_bytes(entry: Path) -> bytes:
    with entry.open("rb") as file:
        return file.read(len(np.lib.format.MAGIC_PREFIX))


def _touch(*paths: Path) -> None:
    """Note that files were used now; a cache that may only be read stays as it is."""
    with suppress(OSError):
        for path in paths:
            os.utime(path)


def _evict(folder: Path) -> None:
    """Remove what no run used for a long time; a run that has a file mapped keeps it until its end."""
    with suppress(OSError):
        for path in folder.iterdir():
            is_ours = _ENTRY.fullmatch(path.name) or _POINTER.fullmatch(path.name)
            if is_ours and time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink(missing_ok=True)


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    """Open a file of the cache that appears when everything is on disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            yield file
    except OSError as error:
        raise DataError(f"data.cache: cannot write {path}: {error}; choose another folder") from error


def _hash_files(root: Path, split: str, files: list[ImageFile], progress: Progress | None) -> list[str]:
    def hash_file(index: int) -> str:
        return hashlib.sha256(_read(root / files[index].path)).hexdigest()

    return list(_in_parallel(f"hash {split} images", hash_file, len(files), progress))


def _decode_files(
    root: Path,
    split: str,
    files: list[ImageFile],
    hashes: list[str] | None,
    fit: decode.Fit,
    progress: Progress | None,
) -> Iterator[bytes]:
    """Yield each image's pixels, (3, image_size, image_size), in order; None: of whatever is there now."""

    def decode_file(index: int) -> bytes:
        path = root / files[index].path
        content = _read(path)
        if hashes is not None and hashlib.sha256(content).hexdigest() != hashes[index]:
            raise DataError(f"{path}: changed while it was being read; start again")
        return decode.decode_named(path, content, fit).tobytes()

    with decode.bombs_refused():
        yield from _in_parallel(f"decode {split} images", decode_file, len(files), progress)


def _in_parallel(what: str, work: Callable[[int], _T], total: int, progress: Progress | None) -> Iterator[_T]:
    """Yield work(0), work(1), ... computed by a pool of threads; PIL and hashlib release the GIL."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, total, _CHUNK):
            stop = min(total, start + _CHUNK)
            yield from pool.map(work, range(start, stop))
            if progress is not None:
                progress(what, stop, total)


def _read(path: Path) -> bytes:
    try:
        return decode.read_file(path)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
