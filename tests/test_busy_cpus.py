"""Other processes on the same cores: told from recorded clocks, and never on a quiet machine."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from bncli.busy_cpus import NUM_WINDOWS, WINDOW, CpuTimes, Shortage, ShortageWatch, read_cpu_times

# One line a CPU as Linux writes it: user nice system idle iowait irq softirq steal guest guest_nice
STAT = """\
cpu  300 20 100 5000 40 6 4 10 7 1
cpu0 100 10 50 2500 20 3 2 5 7 1
cpu1 200 10 50 2500 20 3 2 5 0 0
cpu10 1000 0 0 0 0 0 0 0 0 0
intr 12345 1 2 3
ctxt 99
"""


def test_what_a_cpu_was_busy_with_is_all_but_its_idle_time(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STAT)

    def busy(*cpus: int) -> float:
        found = read_cpu_times(tmp_path / "stat", set(cpus))
        assert found is not None
        assert found.num_cpus == len(cpus)
        return found.busy

    assert busy(0) == pytest.approx(1.70)
    assert busy(0, 1) == pytest.approx(4.40)  # without those that this process may not use
    assert busy(1, 10) == pytest.approx(12.70)


@pytest.mark.parametrize("content", [None, "", "cpu0 a b\n", "cpu0\n", b"\xff\xfecpu0 1 2"])
def test_a_system_that_does_not_tell_is_never_busy(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "stat"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    first, second = read_cpu_times(path, {0}), read_cpu_times(path, {0})
    assert first is None or second is None or second.others_since(first) == 0


def told(clocks: Sequence[tuple[float, float, float]], num_threads: int, num_cpus: int) -> Shortage | None:
    """What a watch says of recorded clocks (now, busy, own), one in each step."""
    times = iter([CpuTimes(now, busy, own, num_cpus) for now, busy, own in clocks])
    now = iter([now for now, *_ in clocks[1:]])
    watch = ShortageWatch(num_threads, read=lambda: next(times), clock=lambda: next(now))
    found = [watch.after_step() for _ in clocks[1:]]
    assert sum(one is not None for one in found) <= 1  # once
    return next((one for one in found if one is not None), None)


def steady(others: float, own: float, *, windows: int = 6) -> list[tuple[float, float, float]]:
    seconds = [index * WINDOW for index in range(windows + 1)]
    return [(100 + second, 50 + (others + own) * second, 7 + own * second) for second in seconds]


@pytest.mark.parametrize(
    ("others", "num_threads", "num_cpus", "better"),
    [
        (0.0, 2, 2, None),
        (0.2, 2, 2, None),  # a browser and the system
        (0.7, 2, 2, None),
        (1.0, 2, 2, 1),
        (1.7, 2, 2, 1),
        (2.0, 2, 2, 1),
        (1.0, 1, 2, None),  # one thread has a CPU to itself
        (2.0, 1, 2, None),  # and can be no fewer
        (1.0, 16, 16, 15),
        (6.1, 16, 16, 10),
        (6.1, 8, 16, None),  # enough CPUs are left
        (1.0, 2, 16, None),
        (15.0, 2, 16, 1),  # a quota of 2 on a machine that is full
    ],
)
def test_a_shortage_is_told_with_as_many_threads_as_cpus_are_free(
    others: float, num_threads: int, num_cpus: int, better: int | None
) -> None:
    found = told(steady(others, num_threads * 0.7), num_threads, num_cpus)
    assert (found and found.better_threads) == better
    if found is not None:
        assert f"other processes use {others:.1f} of {num_cpus} cores" in str(found)
        assert f"--set runtime.threads={better} would be faster" in str(found)


def test_a_short_burst_is_no_shortage() -> None:
    quiet, burst = (0.1, 1.4), (1.9, 0.3)
    for pattern in ([burst, quiet, burst, quiet], [quiet, burst, quiet, quiet], [burst] + [quiet] * 3):
        now, busy, own = 0.0, 0.0, 0.0
        clocks = [(now, busy, own)]
        for others, ours in pattern:
            now, busy, own = now + WINDOW, busy + (others + ours) * WINDOW, own + ours * WINDOW
            clocks.append((now, busy, own))
        assert told(clocks, 2, 2) is None
    assert told(steady(1.5, 0.5, windows=2), 2, 2) is not None


def test_only_the_beginning_is_watched() -> None:
    late = steady(0.0, 1.4, windows=NUM_WINDOWS)
    now, busy, own = late[-1]
    late += [(now + step * WINDOW, busy + 2 * step * WINDOW, own) for step in (1, 2, 3)]
    times = iter([CpuTimes(*clock, 2) for clock in late])
    clock = iter([now for now, *_ in late[1:]])
    watch = ShortageWatch(2, read=lambda: next(times), clock=lambda: next(clock))
    assert [watch.after_step() for _ in late[1:]] == [None] * (len(late) - 1)


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="only Linux tells")
def test_a_busy_process_is_seen() -> None:
    before = read_cpu_times()
    assert before is not None
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(0.5)
        after = read_cpu_times()
        other.kill()
    assert after is not None
    assert 0.3 < after.others_since(before) <= len(os.sched_getaffinity(0))
