"""Writing a file so that a crash leaves the old one or the new one, never half of it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic_file(path: Path, *, follows: bool = False) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that takes its place when the block ends well.

    File and directory are flushed to the disk first. When the block raises, whatever it is, `path` is what
    it was before and the temporary file is gone. Whatever lies at `path` is replaced: in a folder that may
    come from anybody a link could lead anywhere, and a pipe would be waited for. With `follows`, for a path
    that the user names, a symbolic link stays and what it leads to is written, and a pipe or a device such as
    /dev/null is written as it is.

    Raises:
        OSError: when the file cannot be written.
    """
    if follows:
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                yield file
            return
        path = Path(os.path.realpath(path))
    # the leading dot and the suffix keep it out of `*.pt`; the same directory makes the rename atomic
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only the owner reads
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error tells more than that the directory is gone
            temporary.unlink()
        raise
    sync_directory(path.parent)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk, so that a new file is found after a power failure.

    Raises:
        OSError: when it cannot be opened.
    """
    if os.name != "posix":  # Windows cannot open a directory
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
