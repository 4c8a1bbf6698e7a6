"""One process in one run directory: a lock that the kernel gives back when its holder dies, however it dies.

`flock` on the file `.lock`. The file stays behind and means nothing by itself: what counts is whether a
living process holds it; it says which. File systems without locks (some on the network) are used without one.
"""

import contextlib
import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from bncli.errors import RunError

LOCK_NAME = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the lock of an existing directory.

    Raises:
        RunError: when another process holds it, naming that process.
        OSError: when the file cannot be written.
    """
    # a link would lead to a file that is none of ours, and it is about to be overwritten
    handle = os.open(run_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"
            raise RunError(
                f"{run_dir}: another run is writing here (process {holder}); wait for it, or stop it"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)  # which unlocks
