"""A temporary file for tensors that find no room in memory.

It has no name from the start, so nothing is left of it after Ctrl-C or kill, and it lies in `TMPDIR`, or else
in /var/tmp, since /tmp is often memory. One thread reads and writes while the model computes. It goes past
the page cache where the file system allows that: what is read once a pass would only displace other data.
Measured on a virtual machine: 0.7 to 1 GB/s both ways, against 0.2 GB/s for a first write through the cache.
"""

import errno
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PAGE = 4096  # past the cache, transfers begin at multiples of it, in memory and in the file
_MAX_WRITES = 2  # waiting, each with a copy in memory


@dataclass(frozen=True)
class Layout:
    """What a copy of a tensor looks like in memory: without gaps, strides kept where that is possible."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        """The layout that `tensor.clone()` has."""
        copy = torch.empty_like(tensor, device="meta")
        return cls(tuple(copy.size()), copy.stride(), copy.dtype)

    @property
    def num_bytes(self) -> int:
        """Of the numbers."""
        return torch.Size(self.size).numel() * self.dtype.itemsize

    def over(self, memory: Tensor) -> Tensor:
        """The tensor that lies at the beginning of this memory, uint8 (num_bytes,)."""
        return memory[: self.num_bytes].view(self.dtype).as_strided(self.size, self.stride)


@dataclass(frozen=True)
class Place:
    """In the file, in bytes."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next one may begin."""
        return self.offset + self.size


def folder() -> Path:
    """Where the file goes: `TMPDIR`, or else /var/tmp, or else where temporary files go."""
    lasting = Path("/var/tmp")
    if "TMPDIR" not in os.environ and os.access(lasting, os.W_OK):
        return lasting
    return Path(tempfile.gettempdir())


def usable_bytes() -> int:
    """Half of what is free there; 0 where that cannot be found out."""
    try:
        return shutil.disk_usage(folder()).free // 2
    except OSError:
        return 0


class SpillFile:
    """Raises OSError if there can be no such file. What fails later fails in the future that is returned."""

    def __init__(self) -> None:
        self._file: Any = tempfile.TemporaryFile(buffering=0, dir=folder())  # noqa: SIM115 - see `close`
        self._thread = ThreadPoolExecutor(1, "bncli-spill")
        self._writes: deque[Future[None]] = deque()
        self._num_bytes = 0  # given away, and gaps in between
        self._gaps: list[Place] = []  # in order
        _bypass_cache(self._file)

    def allocate(self, num_bytes: int, max_bytes: int) -> Place | None:
        """The first place for so many bytes, in a file of at most `max_bytes`; None if there is none."""
        size = _in_pages(num_bytes)
        for number, gap in enumerate(self._gaps):
            if gap.size >= size:
                self._gaps[number : number + 1] = _joined([Place(gap.offset + size, gap.size - size)])
                return Place(gap.offset, size)
        end = self._num_bytes
        if self._gaps and self._gaps[-1].end == end:
            end = self._gaps[-1].offset
        if end + size > max_bytes:
            return None
        self._gaps = [gap for gap in self._gaps if gap.offset < end]
        self._num_bytes = end + size
        return Place(end, size)

    def free(self, place: Place) -> None:
        """Let others have this place."""
        self._gaps = _joined([*self._gaps, place])

    def write(self, place: Place, layout: Layout, tensor: Tensor) -> "Future[None]":
        """Write a copy of the tensor as it is now. Waits where several others are waiting already."""
        memory = _pages(layout.num_bytes)
        layout.over(memory).copy_(tensor)
        while len(self._writes) >= _MAX_WRITES:
            wait([self._writes.popleft()])
        self._writes.append(self._thread.submit(self._transfer, place, memory, self._file.write))
        return self._writes[-1]

    def read(self, place: Place, layout: Layout) -> "Future[Tensor]":
        """The tensor that was written there, in memory of its own on the CPU."""

        def fetch() -> Tensor:
            memory = _pages(layout.num_bytes)
            self._transfer(place, memory, self._file.readinto)
            return layout.over(memory)

        return self._thread.submit(fetch)

    def _transfer(self, place: Place, memory: Tensor, move: Callable[[memoryview], int | None]) -> None:
        view = _view(memory)
        self._file.seek(place.offset)
        while view:
            moved = move(view)
            if not moved:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            view = view[moved:]

    def close(self) -> None:
        """Give the disk back."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._file.close()


def _joined(places: Sequence[Place]) -> list[Place]:
    """The same bytes in as few places as possible, in order."""
    found: list[Place] = []
    for place in sorted(places, key=lambda place: place.offset):
        if found and found[-1].end == place.offset:
            found[-1] = Place(found[-1].offset, found[-1].size + place.size)
        elif place.size:
            found.append(place)
    return found


def _in_pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE


def _pages(num_bytes: int) -> Tensor:
    """Memory for so many bytes, from the beginning of a page on and in whole pages: uint8 on the CPU."""
    memory = torch.empty(_in_pages(num_bytes) + _PAGE, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % _PAGE
    return memory[start : start + _in_pages(num_bytes)]


def _view(memory: Tensor) -> memoryview:
    numbers: Any = memory.numpy()
    return memoryview(numbers)


def _bypass_cache(file: Any) -> None:
    """Where it is possible: not in memory, and not on every file system."""
    with suppress(ImportError, AttributeError, OSError):
        import fcntl

        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        try:
            file.write(_view(_pages(_PAGE)))
        except OSError:
            fcntl.fcntl(file, fcntl.F_SETFL, flags)
