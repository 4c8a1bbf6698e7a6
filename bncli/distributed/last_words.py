"""Why a launch of several processes ends: said once, by the first of them that knows.

The processes share a small store, that of torchrun, which outlives each of them. Whoever fails first takes
the word there, and the others end without one. Every process also leaves a sign of life in it a few times a
second, so that those that are left know which one died.
"""

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from bncli.distributed.launch import Launch

SPOKEN = "bncli/spoken"
_BEAT = 0.25  # seconds between two signs of life
_SILENCE = 3.0  # seconds without one after which a process counts as gone
_PATIENCE = 10.0  # the same where nothing else tells that something is wrong
_CONNECT = timedelta(seconds=20)


class LastWords:
    """The common store as far as it serves to end. Without one, every process speaks for itself."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._store: Any = None
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None
        self._num_groups = 0
        self._places: list[str] = []  # of all ranks, once they are known

    def store(self, timeout: timedelta = _CONNECT) -> Any:
        """The store of this launch and restart; imports torch.

        Raises:
            RuntimeError: when it cannot be reached, one of PyTorch's errors.
        """
        if self._store is None:
            import torch.distributed as dist
            from torch.distributed.rendezvous import rendezvous

            store, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
            # torchrun may keep the store over a restart, with what was said before it
            attempt = f"bncli/attempt/{self.launch.restarts}"
            self._store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
        return self._store

    def next_group(self) -> str:
        """The name of the next process group, the same in all processes."""
        self._num_groups += 1
        return f"bncli/group/{self._num_groups}"

    def live(self) -> None:
        """Leave signs of life from now on."""
        if self._beating is None:
            self._stop.clear()
            self.store().set(_place_key(self.launch.rank), _own_place())
            own = self.store().clone()  # a connection of its own: this one may be waiting
            self._beating = threading.Thread(
                target=self._beat, args=(own,), daemon=True, name="signs-of-life"
            )
            self._beating.start()

    def learn_places(self) -> None:
        """Remember where all run; to be called when all live."""
        ranks = range(self.launch.num_ranks)
        self._places = [self.store().get(_place_key(rank)).decode() for rank in ranks]

    def named(self, *ranks: int) -> str:
        """These ranks, and where they run if not all run in one place."""
        name = f"rank {', '.join(map(str, ranks))} of {self.launch.num_ranks}"
        if len(set(self._places)) < 2:
            return name
        return f"{name} on {', '.join(dict.fromkeys(self._places[rank] for rank in ranks))}"

    def end(self) -> None:
        """Leave no more signs of life: this process has done its part."""
        if self._beating is not None:
            self._stop.set()
            self._beating.join()
            self._beating = None

    def take(self) -> bool:
        """Whether this process is the first to say why all end."""
        try:
            return int(self.store().add(SPOKEN, 1)) == 1
        except Exception:  # no store: nobody else can be asked
            return True

    def taken(self) -> bool:
        """Whether some process has said why all end."""
        with contextlib.suppress(Exception):
            return bool(self.store().check([SPOKEN]))
        return False

    def missing(self) -> list[int]:
        """The ranks that give no sign of life, after a few seconds of waiting for one."""
        others = [rank for rank in range(self.launch.num_ranks) if rank != self.launch.rank]
        try:
            store = self.store()
            before = {rank: self._beats_of(store, rank) for rank in others}
            deadline = time.monotonic() + _SILENCE
            while before and time.monotonic() < deadline and not self.taken():
                time.sleep(_BEAT / 2)
                before = {r: count for r, count in before.items() if self._beats_of(store, r) == count}
        except Exception:  # the store died, with the process that kept it
            return [0] if self.launch.rank != 0 else []
        return sorted(before)

    def pulse_of(self, rank: int) -> Callable[[], bool]:
        """Whether that process has given a sign of life lately: to be asked again and again."""
        last, heard = -1, time.monotonic()

        def is_alive() -> bool:
            nonlocal last, heard
            beats, now = self._beats_of(self.store(), rank), time.monotonic()
            if beats != last:
                last, heard = beats, now
            return now - heard < _PATIENCE

        return is_alive

    def explain(self, error: str) -> str | None:
        """Why an exchange between the processes failed, in words; None where another one has said it."""
        with contextlib.suppress(Exception):
            self.store().set(_gave_up(self.launch.rank), "1")
        missing = self.missing()
        silent = [] if missing else self._silent()
        if self.taken():
            return None
        if not missing and not silent:
            return f"{self.named(self.launch.rank)}: the processes cannot exchange data: {error}"
        found = missing or silent
        what = "gone: killed, or out of reach" if missing else "alive, but did not answer in time"
        return f"{self.named(*found)} {'is' if len(found) == 1 else 'are'} {what}"

    def _silent(self) -> list[int]:
        """The ranks that did not give up waiting for others: the ones that these others wait for."""
        late = [rank for rank in range(self.launch.num_ranks) if rank != self.launch.rank]
        with contextlib.suppress(Exception):
            for _ in range(5):
                time.sleep(_BEAT)
                late = [rank for rank in late if not self.store().check([_gave_up(rank)])]
            return late
        return []

    def _beats_of(self, store: Any, rank: int) -> int:
        return int(store.add(_key(rank), 0))

    def _beat(self, store: Any) -> None:
        with contextlib.suppress(Exception):  # the store is gone: nobody reads this any more
            while not self._stop.wait(_BEAT):
                store.add(_key(self.launch.rank), 1)


def _own_place() -> str:
    """The machine, and which of its launch torchrun calls it."""
    node = os.environ.get("GROUP_RANK")
    return platform.node() if node is None else f"{platform.node()} (node {node})"


def _place_key(rank: int) -> str:
    return f"bncli/place/{rank}"


def _key(rank: int) -> str:
    return f"bncli/beats/{rank}"


def _gave_up(rank: int) -> str:
    return f"bncli/gave-up/{rank}"
