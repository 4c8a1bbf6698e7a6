"""Whether other processes keep the CPUs busy that a computation has threads for.

Linux counts for each CPU how long it was busy, and for each process how long it computed. What of the first
is not this process's is others'; on a quiet machine that is some hundredths of a CPU. Where the system does
not tell, or counts nothing (as some sandboxes do), nobody is busy. Nothing here imports torch.

The threads of one operation get equal parts of it and wait for each other. So one more thread than there are
free CPUs does not help but delays: two share a CPU, and all others wait for them.
"""

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

WINDOW = 2.0  # seconds that one look takes: 200 ticks of each CPU's clock
NUM_WINDOWS = 10  # looks from the first step on; what begins later is not looked for
# CPUs that threads are short of before it is said: with half a CPU taken from two threads one is no faster
_SHORTAGE = 0.8

_STAT = Path("/proc/stat")
_SECONDS_PER_TICK = 0.01  # of /proc/stat, whatever the kernel's own clock
_IDLE = {3, 4}  # columns of /proc/stat: idle, and idle while a disk works


@dataclass(frozen=True)
class CpuTimes:
    """Clocks read at one moment, in seconds."""

    now: float
    busy: float  # of the CPUs that this process may use, by anybody, since the machine's start
    own: float  # of this process, with all its threads
    num_cpus: int  # that this process may use

    def others_since(self, before: "CpuTimes") -> float:
        """How many CPUs other processes kept busy, on average."""
        others = (self.busy - before.busy) - (self.own - before.own)
        return min(max(0.0, others / (self.now - before.now)), float(self.num_cpus))


@dataclass(frozen=True)
class Shortage:
    """Fewer CPUs are free than a computation has threads."""

    num_threads: int
    num_cpus: int  # that this process may use
    num_busy: float  # of these, by others, on average

    @property
    def better_threads(self) -> int:
        """As many as there are free CPUs, and one at least."""
        return max(1, int(self.num_cpus - self.num_busy + 0.25))

    def __str__(self) -> str:
        """One sentence, with what to type."""
        return (
            f"other processes use {self.num_busy:.1f} of {self.num_cpus} cores:"
            f" --set runtime.threads={self.better_threads} would be faster"
            " (other rounding, as if with another seed)"
        )


def read_cpu_times(stat: Path = _STAT, allowed: Collection[int] | None = None) -> CpuTimes | None:
    """Now; None where the system does not tell. `allowed`: numbers of CPUs, if not those of this process."""
    if allowed is None:
        if not hasattr(os, "sched_getaffinity"):
            return None
        allowed = os.sched_getaffinity(0)
    try:
        ticks = sum(
            _busy_ticks(line) for line in stat.read_text("ascii").splitlines() if _cpu(line) in allowed
        )
    except (OSError, ValueError):
        return None
    return CpuTimes(time.monotonic(), ticks * _SECONDS_PER_TICK, time.process_time(), len(allowed))


def _cpu(line: str) -> int | None:
    """The number of the CPU that a line of /proc/stat is about."""
    number = line.partition(" ")[0].removeprefix("cpu")
    return int(number) if line.startswith("cpu") and number.isdigit() else None


def _busy_ticks(line: str) -> int:
    # user nice system idle iowait irq softirq steal; the guests that follow are in the first two as well
    ticks = [int(word) for word in line.split()[1:9]]
    return sum(count for column, count in enumerate(ticks) if column not in _IDLE)


class ShortageWatch:
    """Looks for a shortage of CPUs at the beginning of a computation; each step costs a look at a clock."""

    def __init__(
        self,
        num_threads: int,
        *,
        read: Callable[[], CpuTimes | None] = read_cpu_times,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin the first window now."""
        self._num_threads = num_threads
        self._read = read
        self._clock = clock
        self._windows_left = NUM_WINDOWS if num_threads > 1 else 0
        self._start = read() if self._windows_left else None
        self._was_short = False

    def after_step(self) -> Shortage | None:
        """The shortage of two windows in a row, once; None otherwise, and before a window is over."""
        if self._start is None or not self._windows_left:
            return None
        if self._clock() - self._start.now < WINDOW:
            return None
        end = self._read()
        if end is None:
            return None
        self._windows_left -= 1
        busy = end.others_since(self._start)
        self._start = end
        is_short = self._num_threads - (end.num_cpus - busy) > _SHORTAGE
        if is_short and self._was_short:
            self._windows_left = 0
            return Shortage(self._num_threads, end.num_cpus, busy)
        self._was_short = is_short
        return None
