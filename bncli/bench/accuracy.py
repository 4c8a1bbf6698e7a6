"""Seconds until an accuracy is reached, by `bncli train` in a process of its own for every seed.

The clock starts with the process, so that imports, reading the data and every evaluation count. It is read
when an epoch's line appears in metrics.jsonl: the accuracy is that of running statistics on the whole test
split, plain, without test-time augmentation. What the next epoch would have reached half-way is not seen.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bncli.errors import BncliError
from bncli.runtime import describe_machine

_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class TrainedSeed:
    """One run."""

    seed: int
    epochs: tuple[tuple[float, float], ...]  # of each: seconds since the start, accuracy on the test split
    seconds: float  # until the process had ended
    peak_mib: float | None  # of the process's memory; None where the system does not tell

    def seconds_to(self, accuracy: float) -> float | None:
        """When an epoch ended with at least this accuracy; None: none did."""
        return next((seconds for seconds, reached in self.epochs if reached >= accuracy), None)

    @property
    def accuracy(self) -> float:
        """After the last epoch."""
        return self.epochs[-1][1]


@dataclass(frozen=True)
class Target:
    """How long it took to reach one accuracy."""

    accuracy: float  # as a fraction
    num_reached: int  # seeds that reached it
    seconds_mean: float | None  # over those; None without any
    seconds_std: float | None  # sample standard deviation; None for fewer than two


@dataclass(frozen=True)
class AccuracyBench:
    """What was measured."""

    command: str
    commit: str | None  # of the checkout that bncli was run from; None: it was installed from elsewhere
    num_seeds: int
    targets: tuple[Target, ...]
    accuracy_mean: float  # after the last epoch
    accuracy_std: float | None
    seconds_mean: float  # of whole processes
    peak_mib: float | None  # the largest
    seeds: tuple[TrainedSeed, ...]
    machine: dict[str, Any]


def bench_accuracy(
    config_path: str | Path,
    overrides: Sequence[str],
    targets: Sequence[float],
    *,
    num_seeds: int = 3,
    report: Callable[[str], None] = lambda _: None,
) -> AccuracyBench:
    """Train with seeds 0, 1, ... one after the other. `targets` are accuracies as fractions.

    Raises:
        BncliError: when a run fails; the message is its own.
    """
    seeds = []
    for seed in range(num_seeds):
        seeds.append(_train(Path(config_path), overrides, seed))
        done = seeds[-1]
        report(
            f"seed {seed}: {done.accuracy:.2%} after {len(done.epochs)} epochs, {done.seconds:.1f} s in all"
        )
    options = [option for override in overrides for option in ("--set", override)]
    shown = ",".join(f"{target:g}" for target in targets)
    command = ["bncli", "bench", "accuracy", str(config_path), *options, "--target", shown]
    return AccuracyBench(
        command=" ".join([*command, "--seeds", str(num_seeds)]),
        commit=_commit(),
        num_seeds=num_seeds,
        targets=tuple(reach(target, seeds) for target in sorted(set(targets))),
        accuracy_mean=statistics.fmean(seed.accuracy for seed in seeds),
        accuracy_std=_deviation([seed.accuracy for seed in seeds]),
        seconds_mean=statistics.fmean(seed.seconds for seed in seeds),
        peak_mib=max((seed.peak_mib for seed in seeds if seed.peak_mib is not None), default=None),
        seeds=tuple(seeds),
        machine=describe_machine(),
    )


def reach(accuracy: float, seeds: Sequence[TrainedSeed]) -> Target:
    """The seeds that reached an accuracy, and how long they took on average."""
    times = [seconds for seed in seeds if (seconds := seed.seconds_to(accuracy)) is not None]
    mean = statistics.fmean(times) if times else None
    return Target(accuracy, len(times), mean, _deviation(times))


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _train(config: Path, overrides: Sequence[str], seed: int) -> TrainedSeed:
    with tempfile.TemporaryDirectory(prefix="bncli-bench-") as folder:
        run_dir, errors = Path(folder, "run"), Path(folder, "stderr")
        options = [
            option for override in (*overrides, f"train.seed={seed}") for option in ("--set", override)
        ]
        command = [sys.executable, "-m", "bncli", "train", str(config), "--run-dir", str(run_dir), *options]
        with errors.open("wb") as stderr:
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
            try:
                epochs, peak_mib = _watch(process, run_dir / "metrics.jsonl", start)
            except BaseException:  # Ctrl-C: the run must not outlive us
                process.kill()
                process.wait()
                raise
        seconds = time.perf_counter() - start
        if process.returncode != 0 or not epochs:
            lines = errors.read_text(errors="replace").splitlines()
            reason = lines[-1].removeprefix("bncli: ") if lines else f"exit code {process.returncode}"
            raise BncliError(f"the run with seed {seed} failed: {reason}")
        return TrainedSeed(seed, tuple(epochs), seconds, peak_mib)


def _watch(
    process: subprocess.Popen[bytes], metrics: Path, start: float
) -> tuple[list[tuple[float, float]], float | None]:
    """The time and accuracy of every epoch, and the peak memory, once the process has ended."""
    epochs: list[tuple[float, float]] = []
    peak_mib = None
    has_ended = False
    while not has_ended:
        time.sleep(_POLL_SECONDS)
        has_ended, peak_mib = _ended(process)
        now = time.perf_counter() - start
        if metrics.is_file():
            lines = metrics.read_bytes().split(b"\n")[:-1]  # whole ones
            epochs += [(now, json.loads(line)["test_accuracy"]) for line in lines[len(epochs) :]]
    return epochs, peak_mib


def _ended(process: subprocess.Popen[bytes]) -> tuple[bool, float | None]:
    """Whether the process has ended, and its peak memory in MiB if the system tells."""
    if not hasattr(os, "wait4"):  # Windows
        return process.poll() is not None, None
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid == 0:
        return False, None
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return True, usage.ru_maxrss * unit / 2**20


def _commit() -> str | None:
    """The commit of the checkout that this file lies in, marked where it was changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
