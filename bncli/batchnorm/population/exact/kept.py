"""One tensor for every batch, kept for a later pass: in memory as long as there is room, then on disk.

A disk that fills up or fails costs no more than time: what it does not give back is not kept.
"""

from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from bncli.batchnorm.population.exact import spill
from bncli.batchnorm.population.exact.dataflow import Cut
from bncli.batchnorm.population.exact.spill import Layout, SpillFile, in_pages

MAX_BYTES = 2**30  # in memory, on the model's device


@dataclass(frozen=True, eq=False)
class _OnDisk:
    offset: int
    layout: Layout
    written: "Future[None]"


@dataclass(frozen=True, eq=False)
class _Entry:
    cut: Cut
    where: Tensor | _OnDisk


class KeptOutputs:
    """The output of a cut for each batch, by a digest of the batch."""

    def __init__(self, device: torch.device | None) -> None:
        self.disk_bytes = spill.usable_bytes()  # that may be used, all in all
        self._device = device
        self._entries: dict[bytes, _Entry] = {}
        self._num_bytes = 0  # in memory
        self._file: SpillFile | None = None
        self._places: dict[bytes, tuple[int, int]] = {}  # in the file: offset and size
        self._ahead: tuple[_Entry, Future[Tensor]] | None = None

    def __len__(self) -> int:
        """How many batches something is kept of."""
        return len(self._entries)

    def __contains__(self, digest: object) -> bool:
        """Whether something is kept of this batch."""
        return digest in self._entries

    def put(self, digest: bytes, cut: Cut, output: Tensor, place_bytes: int | None) -> None:
        """Keep a copy in place of what was kept of this batch, if there is room for it.

        A place on disk is made `place_bytes` large, for what comes later; with None there is none.
        """
        layout = Layout.of(output)
        older = self._entries.get(digest)
        held = 0 if older is None or isinstance(older.where, _OnDisk) else _num_bytes(older.where)
        if self._num_bytes - held + layout.num_bytes <= MAX_BYTES:
            self._entries[digest] = _Entry(cut, output.clone())
            self._num_bytes += layout.num_bytes - held
            return
        offset = None if place_bytes is None else self._place(digest, max(place_bytes, layout.num_bytes))
        if self._file is not None and offset is not None:
            written = self._file.write(offset, layout, output)
            self._entries[digest] = _Entry(cut, _OnDisk(offset, layout, written))
            self._num_bytes -= held

    def get(self, digest: bytes, following: bytes | None) -> tuple[Cut, Tensor] | None:
        """What is kept of this batch, as a copy that may be written to; the following one is read ahead."""
        entry = self._entries.get(digest)
        ahead = self._reading(entry)
        self._ahead = None
        after = None if following is None else self._entries.get(following)
        if after is not None and isinstance(after.where, _OnDisk):
            self._ahead = (after, self._read(after.where))
        if entry is None:
            return None
        if isinstance(entry.where, Tensor):
            return entry.cut, entry.where.clone()
        try:
            entry.where.written.result()
            return entry.cut, (ahead or self._read(entry.where)).result().to(self._device)
        except OSError:
            self._lose([digest])
            return None

    def settle(self) -> None:
        """Wait until all is written; forget what could not be."""
        failed = [
            digest
            for digest, entry in self._entries.items()
            if isinstance(entry.where, _OnDisk) and entry.where.written.exception() is not None
        ]
        if failed:
            self._lose(failed)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._num_bytes = 0

    def close(self) -> None:
        """Forget everything and give the disk back."""
        self.clear()
        self._ahead = None
        if self._file is not None:
            self._file.close()

    def _reading(self, entry: _Entry | None) -> "Future[Tensor] | None":
        if self._ahead is not None and self._ahead[0] is entry:
            return self._ahead[1]
        return None

    def _read(self, where: _OnDisk) -> "Future[Tensor]":
        assert self._file is not None
        return self._file.read(where.offset, where.layout)

    def _place(self, digest: bytes, num_bytes: int) -> int | None:
        """Where in the file this batch goes; None if there is no room."""
        offset, size = self._places.get(digest, (0, -1))
        if size >= num_bytes:
            return offset
        used = 0 if self._file is None else self._file.num_bytes
        if used + in_pages(num_bytes) > self.disk_bytes:
            return None
        if self._file is None:
            with suppress(OSError):
                self._file = SpillFile()
        if self._file is None:
            self.disk_bytes = 0
            return None
        self._places[digest] = self._file.allocate(num_bytes), in_pages(num_bytes)
        return self._places[digest][0]

    def _lose(self, digests: Iterable[bytes]) -> None:
        """Forget these and write no more: a disk that failed once is full or broken."""
        for digest in digests:
            del self._entries[digest]
        self.disk_bytes = 0
        self._places.clear()


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
