"""kill -9 at any instant: real processes, real SIGKILL."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bncli.checkpoints import load_checkpoint
from tests.faults.conftest import metrics_of, same_run

ROOT = Path(__file__).parent.parent.parent
INTERVAL = 3  # steps between checkpoints


@dataclass
class Zygote:
    """Starts training processes: `start` returns the PID, `wait` the wait status."""

    process: subprocess.Popen
    config: Path

    def start(self, run_dir: Path, *overrides: str, die_at: int = 0) -> int:
        request = {
            "config": str(self.config),
            "run_dir": str(run_dir),
            "overrides": overrides,
            "die_at": die_at,
            "log": str(run_dir) + ".log",
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def zygote(faulty_config: Path) -> Iterator[Zygote]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "zygote.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        yield Zygote(process, faulty_config)
        process.stdin.close()


def redone_steps(run_dir: Path) -> list[int]:
    """For every session but the first, how many steps it took again; also the log is that of a good run."""
    sessions = Path(f"{run_dir}.log").read_text().split("start\n")[1:]
    steps = [[int(line) for line in text.splitlines() if line.isdigit()] for text in sessions]
    redone, furthest = [], 0
    for numbers in steps:
        if numbers:
            assert numbers == list(range(numbers[0], numbers[-1] + 1))
            redone.append(furthest - numbers[0] + 1)
            furthest = max(furthest, numbers[-1])
    return redone[1:]


def num_moments(zygote: Zygote, run_dir: Path) -> int:
    zygote.start(run_dir)
    assert zygote.wait() == 0, Path(f"{run_dir}.log").read_text()
    return int(Path(f"{run_dir}.log").read_text().split("moments ")[1])


def kill_at(zygote: Zygote, run_dir: Path, moment: int) -> None:
    zygote.start(run_dir, die_at=moment)
    assert zygote.wait() == signal.SIGKILL
    if (run_dir / "last.pt").exists():
        load_checkpoint(run_dir / "last.pt")  # whole, and verified
    zygote.start(run_dir)
    assert zygote.wait() == 0, Path(f"{run_dir}.log").read_text()
    assert all(redone <= INTERVAL for redone in redone_steps(run_dir)), moment


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_of_any_write_ends_like_one_that_was_not(
    zygote: Zygote, whole_run: Path, tmp_path: Path, part: int
) -> None:
    """Before and after every mkdir, rename and fsync, in every temporary file, and half-way through writes.

    The quick suite takes every 41st moment, the slow one the others.
    """
    total = num_moments(zygote, tmp_path / "counted")
    assert total > 100
    assert same_run(whole_run, tmp_path / "counted")
    for moment in range(1, total + 1):
        if (moment % 41 == 0) == (part == 0):
            kill_at(zygote, tmp_path / f"run-{moment}", moment)
            assert same_run(whole_run, tmp_path / f"run-{moment}"), moment


def kill_sometime(pid: int, run_dir: Path, seconds: float, *, in_write: bool) -> bool:
    """Kill a process after so many seconds, or in the write of a checkpoint; whether it left half of one."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not in_write:
        time.sleep(0.001)
    limit = time.monotonic() + 60
    while in_write and time.monotonic() < limit and not list(run_dir.glob(".last.pt.*.tmp")):
        pass
    os.kill(pid, signal.SIGKILL)
    return bool(list(run_dir.glob(".*.tmp")))


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_like_one_that_was_not(zygote: Zygote, tmp_path: Path) -> None:
    """At seeded random times; every second one while a checkpoint is being written."""
    longer = "train.epochs=25"
    start = time.monotonic()
    zygote.start(tmp_path / "whole", longer)
    assert zygote.wait() == 0
    # by this machine's speed: the ten sessions that are killed by the clock take half a run together
    longest = (time.monotonic() - start) / 10
    random_times = random.Random(6)
    num_kills = num_torn = 0
    run_dir = tmp_path / "killed"
    while num_kills < 20:
        pid = zygote.start(run_dir, longer)
        seconds = random_times.uniform(0, longest)
        num_torn += kill_sometime(pid, run_dir, seconds, in_write=num_kills % 2 == 1)
        assert zygote.wait() == signal.SIGKILL, "it was done before it was killed"
        num_kills += 1
    zygote.start(run_dir, longer)
    assert zygote.wait() == 0
    assert num_torn > 0
    assert same_run(tmp_path / "whole", run_dir)
    assert len(metrics_of(run_dir)) == 25
    redone = redone_steps(run_dir)
    assert any(redone)
    assert all(steps <= INTERVAL for steps in redone)


@pytest.mark.slow
def test_tensorboard_has_every_epoch_once_after_a_kill_at_any_moment(zygote: Zygote, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tests.training.test_event_log import LOG, lines, scalars

    # once with checkpoints in the midst of epochs, once with epochs that none follows
    for every, unit in ((INTERVAL, "steps"), (2, "epochs")):
        overrides = [*LOG, f"train.checkpoint_every={every}", f"train.checkpoint_unit={unit}"]
        zygote.start(tmp_path / unit, *overrides)
        assert zygote.wait() == 0, Path(f"{tmp_path / unit}.log").read_text()
        total = int(Path(f"{tmp_path / unit}.log").read_text().split("moments ")[1])
        for moment in range(5, total + 1, 5):
            run = tmp_path / f"{unit}-{moment}"
            zygote.start(run, *overrides, die_at=moment)
            assert zygote.wait() == signal.SIGKILL
            zygote.start(run, *overrides)
            assert zygote.wait() == 0, Path(f"{run}.log").read_text()
            expected = [(line["step"], pytest.approx(line["test_accuracy"])) for line in lines(run)]
            assert scalars(run)["test_accuracy"] == expected, moment
