"""Where a file's bytes come from: a local file, or a URL that fsspec opens.

Bytes are read by position, so that a file of many gigabytes costs only what is asked for. Opened for
reading, never for writing.
"""

import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

from bncli.errors import CheckpointError, OtherFormatError

# Nothing that is read at once comes near this: a zip directory of 200,000 entries is 16 MiB, and the tensors
# of a BatchNorm layer are kilobytes. A length that a hostile file claims stops here.
MAX_READ = 64 * 2**20
# Of one source: many tensors of a hostile file may lie in the same bytes. A comparison reads each once.
MAX_READ_IN_ALL = 2**31
MAX_TIMES_READ = 2  # of a file that is larger than that
MAX_NAMES = 1000  # of a directory that are looked at
COPIED_AT_ONCE = 16 * 2**20  # bytes, where the kernel does not copy by itself


class UnreadableFileError(Exception):
    """What is wrong with a file's content, without its name, which `open_checkpoint` adds."""

    public: type[CheckpointError] = CheckpointError  # what it becomes then


class ForeignFileError(UnreadableFileError):
    """What a file is instead of a checkpoint that bncli reads."""

    public = OtherFormatError


class DirectoryError(ForeignFileError):
    """A directory where a file was expected."""

    def __init__(self, names: tuple[str, ...]) -> None:
        """`names` are those in the directory, and in the directories in it, as `0/data`."""
        self.names = names
        super().__init__("a directory, not a checkpoint")


class Patch(NamedTuple):
    """Bytes that a copy of a file has in place of the file's own."""

    position: int  # in the file
    data: bytes

    @property
    def end(self) -> int:
        """The position behind it."""
        return self.position + len(self.data)


@dataclass
class ByteSource:
    """A file of `size` bytes that is read by position."""

    name: str
    size: int
    read_range: Callable[[int, int], bytes]  # start, size
    num_read: int = 0  # bytes so far
    descriptor: int | None = None  # of a local file

    def read_at(self, start: int, size: int) -> bytes:
        """Exactly `size` bytes from `start`.

        Raises:
            UnreadableFileError: where the file ends before that, or far too much is asked for.
        """
        if start < 0 or size < 0 or start + size > self.size:
            raise UnreadableFileError("a damaged or truncated file: it ends before what it claims to hold")
        if size > MAX_READ:
            raise UnreadableFileError(f"it wants {size:,} bytes read at once; bncli stops at {MAX_READ:,}")
        self.count(size)
        data = self.read_range(start, size)
        if len(data) != size:
            raise UnreadableFileError(f"{size:,} bytes were asked for and {len(data):,} came")
        return data

    def count(self, size: int) -> None:
        """Note that so many bytes are read, be it from memory.

        Raises:
            UnreadableFileError: when that is more than a sound file asks for.
        """
        self.num_read += size
        limit = max(MAX_READ_IN_ALL, MAX_TIMES_READ * self.size)
        if self.num_read > limit:
            raise UnreadableFileError(f"more than {limit:,} bytes of it would have to be read")

    def stream(self, start: int = 0, end: int | None = None) -> io.BufferedReader:
        """The bytes from `start` to `end` as a file object."""
        return io.BufferedReader(_Window(self, start, self.size if end is None else end), 2**18)

    def copy_to(self, target: IO[bytes], patches: Sequence[Patch] = ()) -> None:
        """Write all of it to an empty file, with other bytes in the places of the patches.

        Raises:
            UnreadableFileError: where it ends too early, or a patch lies beyond it.
            OSError: when the target cannot be written.
        """
        if any(patch.position < 0 or patch.end > self.size for patch in patches):
            raise UnreadableFileError("a damaged or truncated file: it ends before what it claims to hold")
        start = self._copy_in_kernel(target.fileno())
        target.seek(start)
        while start < self.size:
            data = self.read_range(start, min(COPIED_AT_ONCE, self.size - start))
            if not data:
                raise UnreadableFileError("it became shorter while it was read")
            target.write(data)
            start += len(data)
        for patch in patches:
            target.seek(patch.position)
            target.write(patch.data)

    def _copy_in_kernel(self, target: int) -> int:
        """Copy as much as the system copies without our help (some only note that blocks are shared)."""
        position = 0
        if self.descriptor is None or not hasattr(os, "copy_file_range"):
            return position
        while position < self.size:
            try:
                size = os.copy_file_range(self.descriptor, target, self.size - position, position, position)
            except OSError:  # between these file systems; what is wrong beyond that the plain way meets too
                break
            if size == 0:
                break
            position += size
        return position


class _Window(io.RawIOBase):
    """A part of a source as an unbuffered file."""

    def __init__(self, source: ByteSource, start: int, end: int) -> None:
        super().__init__()
        self._source, self._start, self._end, self._position = source, start, end, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: self._start, io.SEEK_CUR: self._position, io.SEEK_END: self._end}[whence]
        if base + offset < self._start:
            raise UnreadableFileError("a damaged file: it points before its own beginning")
        self._position = base + offset
        return self.tell()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = max(0, min(len(buffer), self._end - self._position))
        buffer[:size] = self._source.read_at(self._position, size) if size else b""
        self._position += size
        return size


@contextmanager
def open_source(source: str) -> Iterator[ByteSource]:
    """Open a path, or a URL such as `s3://bucket/model.pt`, for reading by position.

    Raises:
        CheckpointError: naming it, when it cannot be read.
        DirectoryError: when it is a directory.
    """
    if "://" in source:
        yield _open_url(source)
        return
    path = Path(source)
    if path.is_dir():
        raise DirectoryError(names_in(path))
    try:
        # a pipe would block in open() until somebody writes to it
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(
                f"{source}: a pipe or a device, neither a file nor a URL; copy it into a file"
            )
        descriptor = os.open(path, os.O_RDONLY)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{source}: cannot be read: {reason}") from None
    try:
        yield ByteSource(
            source,
            os.fstat(descriptor).st_size,
            lambda start, size: os.pread(descriptor, size, start),
            descriptor=descriptor,
        )
    finally:
        os.close(descriptor)


def _open_url(url: str) -> ByteSource:
    try:
        import fsspec

        file_system, path = fsspec.core.url_to_fs(url)  # type: ignore[no-untyped-call]
        info = file_system.info(path)
        if info["type"] == "directory":
            below = file_system.ls(path, detail=False)[:MAX_NAMES]
            raise DirectoryError(tuple(name.rstrip("/").rpartition("/")[2] for name in below))
        size = info["size"]
    except DirectoryError:
        raise
    except FileNotFoundError:  # of HTTP a 404, or nobody who listens
        raise CheckpointError(f"{url}: there is no such file, or no such server") from None
    except Exception as error:  # every file system of fsspec raises its own
        raise CheckpointError(f"{url}: cannot be read: {_describe(error)}") from None
    if not isinstance(size, int):
        raise CheckpointError(f"{url}: cannot be read: its server does not tell its size; download it first")

    def read_range(start: int, count: int) -> bytes:
        try:
            found = bytes(file_system.cat_file(path, start=start, end=start + count))
        except Exception as error:
            raise UnreadableFileError(f"cannot be read: {_describe(error)}") from None
        if len(found) > count:  # the whole file came, as from servers that know no ranges
            raise UnreadableFileError("its server does not give parts of a file; download it first")
        return found

    return ByteSource(url, size, read_range)


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def names_in(directory: Path) -> tuple[str, ...]:
    """The names in a directory, then those one level below; none where it cannot be read."""
    try:
        inside = list(islice(directory.iterdir(), MAX_NAMES))
        folders = [path for path in inside if path.is_dir() and not path.is_symlink()]
        below = (f"{folder.name}/{path.name}" for folder in folders for path in folder.iterdir())
        return (*(path.name for path in inside), *islice(below, MAX_NAMES))
    except OSError:
        return ()
