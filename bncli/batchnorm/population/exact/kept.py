"""What modules put out, kept of every batch for later passes: in memory first, then on disk.

A disk that fills up or fails costs no more than time: what it does not give back is not kept.
"""

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from bncli.batchnorm.population.exact import spill
from bncli.batchnorm.population.exact.dataflow import Cut, Value
from bncli.batchnorm.population.exact.spill import Layout, Place, SpillFile

MAX_BYTES = 2**30  # in memory, on the model's device


@dataclass(frozen=True, eq=False)
class _OnDisk:
    place: Place
    layout: Layout
    written: "Future[None]"


@dataclass(frozen=True, eq=False)
class _Entry:
    cut: Cut
    where: dict[Value, Tensor | _OnDisk]  # of all values of the cut


class KeptOutputs:
    """The values of a cut for each batch, by a digest of the batch."""

    def __init__(self, device: torch.device | None, *, num_ranks: int = 1) -> None:
        """`num_ranks` processes keep outputs at the same time, perhaps on one disk."""
        self.disk_bytes = spill.usable_bytes() // num_ranks  # that may be used, all in all
        self._device = device
        self._entries: dict[bytes, _Entry] = {}
        self._num_bytes = 0  # in memory
        self._file: SpillFile | None = None
        self._ahead: tuple[_Entry, dict[Value, Future[Tensor]]] | None = None

    def __len__(self) -> int:
        """How many batches something is kept of."""
        return len(self._entries)

    def __contains__(self, digest: object) -> bool:
        """Whether something is kept of this batch."""
        return digest in self._entries

    def put(self, digest: bytes, cut: Cut, outputs: Mapping[Value, Tensor], *, on_disk: bool) -> None:
        """Keep copies in place of what was kept of this batch; nothing at all if there is no room for them.

        Values that are kept already stay; the others must be in `outputs`.
        """
        older = self._entries.pop(digest, None)
        where = {} if older is None else older.where
        for value in where.keys() - set(cut.values):
            self._release([where.pop(value)])
        for value in cut.values:
            if value not in where and value in outputs:
                stored = self._store(outputs[value], on_disk=on_disk)
                if stored is None:
                    break
                where[value] = stored
        if len(where) == len(cut.values):
            self._entries[digest] = _Entry(cut, where)
        else:
            self._release(where.values())

    def get(
        self, digest: bytes, until: float, following: bytes | None = None
    ) -> tuple[Cut, dict[Value, Tensor]] | None:
        """What is kept of this batch, as copies that may be written to; only what `Cut.needed` says.

        The following batch is read ahead from disk meanwhile.
        """
        entry = self._entries.get(digest)
        reading: dict[Value, Future[Tensor]] = {}
        if entry is not None:
            ahead = self._ahead is not None and self._ahead[0] is entry
            reading = self._ahead[1] if self._ahead is not None and ahead else self._read(entry, until)
        after = None if following is None else self._entries.get(following)
        self._ahead = None if after is None else (after, self._read(after, until))
        if entry is None:
            return None
        found: dict[Value, Tensor] = {}
        try:
            for value in entry.cut.needed(until):
                where = entry.where[value]
                if isinstance(where, _OnDisk):
                    where.written.result()
                    found[value] = reading[value].result().to(self._device)
                else:
                    found[value] = where.clone()
        except OSError:
            self._lose([digest])
            return None
        return entry.cut, found

    def settle(self) -> None:
        """Wait until all is written; forget what could not be."""

        def failed(entry: _Entry) -> bool:
            on_disk = (one for one in entry.where.values() if isinstance(one, _OnDisk))
            return any(one.written.exception() is not None for one in on_disk)

        self._lose([digest for digest, entry in self._entries.items() if failed(entry)])

    def clear(self) -> None:
        """Forget everything."""
        for entry in self._entries.values():
            self._release(entry.where.values())
        self._entries.clear()
        self._ahead = None

    def close(self) -> None:
        """Forget everything and give the disk back."""
        self.clear()
        if self._file is not None:
            self._file.close()

    def _read(self, entry: _Entry, until: float) -> "dict[Value, Future[Tensor]]":
        """Begin to read what of an entry is on disk."""
        found = {}
        for value in entry.cut.needed(until):
            where = entry.where[value]
            if isinstance(where, _OnDisk) and self._file is not None:
                found[value] = self._file.read(where.place, where.layout)
        return found

    def _store(self, output: Tensor, *, on_disk: bool) -> Tensor | _OnDisk | None:
        """A copy, in memory or on disk; None if there is no room."""
        layout = Layout.of(output)
        if self._num_bytes + layout.num_bytes <= MAX_BYTES:
            self._num_bytes += layout.num_bytes
            return output.clone()
        if not on_disk or not self.disk_bytes:
            return None
        if self._file is None:
            with suppress(OSError):
                self._file = SpillFile()
        if self._file is None:
            self.disk_bytes = 0
            return None
        place = self._file.allocate(layout.num_bytes, self.disk_bytes)
        return None if place is None else _OnDisk(place, layout, self._file.write(place, layout, output))

    def _release(self, dropped: Iterable[Tensor | _OnDisk]) -> None:
        for one in dropped:
            if isinstance(one, Tensor):
                self._num_bytes -= one.nbytes
            elif self._file is not None:
                self._file.free(one.place)

    def _lose(self, digests: Collection[bytes]) -> None:
        """Forget these and write no more, if any: a disk that failed once is full or broken."""
        for digest in digests:
            self._release(self._entries.pop(digest).where.values())
            self.disk_bytes = 0
