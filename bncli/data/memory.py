"""Whether there is memory enough for a data set, asked before anything is drawn, read or mapped.

Two different things are called memory. Images kept in RAM need real memory: what the system has available, or
what is left of the container's (cgroup's) allowance. Images mapped from a file need none that could not be
given back, but they need address space, which `ulimit -v` (RLIMIT_AS) and RLIMIT_DATA bound. Whatever a
platform does not tell counts as unlimited.
"""

import contextlib
from pathlib import Path

from bncli.errors import DataError
from bncli.wording import gigabytes

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
SPARE = 256 << 20  # bytes, for the network, its batches and Python itself


def available_memory() -> int | None:
    """Bytes that this process may still fill: of the system, its cgroup and its limits; None if unknown."""
    found = [_of_system(), _of_cgroup(), address_space_left()]
    return min((number for number in found if number is not None), default=None)


def address_space_left() -> int | None:
    """Bytes that this process may still map under `ulimit -v` and RLIMIT_DATA; None: unlimited, unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    left = []
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            left.append(max(0, soft - (_kilobytes("self/status", used) or 0) * 1024))
    return min(left, default=None)


def require_memory(needed: int, *, what: str, fix: str) -> None:
    """Refuse images that would not fit into memory, with the numbers.

    Raises:
        DataError: `needed` bytes and some to work with are more than there are.
    """
    _require(needed + SPARE, available_memory(), f"{what} needs", "of memory", fix)


def require_address_space(needed: int, *, what: str, fix: str) -> None:
    """Refuse a mapping that the process's limits do not allow, with the numbers.

    Raises:
        DataError: `needed` bytes and some to work with are more than the limits leave.
    """
    _require(needed + SPARE, address_space_left(), f"{what} needs", "of address space (ulimit -v)", fix)


def _require(needed: int, available: int | None, what: str, kind: str, fix: str) -> None:
    if available is not None and needed > available:
        numbers = f"{gigabytes(needed, 2)} {kind}, but {gigabytes(available, 2)} are available"
        raise DataError(f"{what} {numbers}; {fix}")


def _of_system() -> int | None:
    kilobytes = _kilobytes("meminfo", "MemAvailable")
    return None if kilobytes is None else kilobytes * 1024


def _of_cgroup() -> int | None:
    """What is left of the container's allowance (cgroup v2); its page cache counts as free."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return max(0, limit - used + cached)
    return None


def _kilobytes(file: str, key: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (_PROC / file).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
    return None
