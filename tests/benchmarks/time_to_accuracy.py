"""When runs first reached an accuracy: pure functions of what was seen of each run.

A mean over seeds is given only where every seed reached the accuracy: a mean of those that happened to reach
it would be too short. The standard deviation is the sample's (n - 1).
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EpochSeen:
    """An epoch's line of metrics.jsonl."""

    epoch: int
    accuracy: float  # on the test split, a fraction
    seconds: float  # from the start of the process until the line was seen


@dataclass(frozen=True)
class SeedRun:
    """One training run in a process of its own."""

    seed: int
    epochs: tuple[EpochSeen, ...]
    accuracy: float  # of the checkpoint to use, in plain eval mode
    seconds: float  # until the process had ended
    peak_mib: float  # of resident memory
    tta_accuracy: float | None = None  # of the same checkpoint over views; None where not asked for
    tta_seconds: float | None = None  # of that pass alone


@dataclass(frozen=True)
class TargetTimes:
    """How long the seeds took to an accuracy."""

    accuracy: float
    num_reached: int
    seconds_mean: float | None  # None unless every seed reached it
    seconds_std: float | None  # None also for a single seed
    seconds: tuple[float | None, ...]  # by seed; None: never reached


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of one quantity over the seeds."""

    mean: float
    std: float | None  # None for a single seed


def parse_epochs(lines: Sequence[str], seconds: float) -> tuple[EpochSeen, ...]:
    """The epochs with an evaluation in whole lines of metrics.jsonl that were all seen at the same time."""
    records = [json.loads(line) for line in lines]
    return tuple(
        EpochSeen(record["epoch"], record["test_accuracy"], seconds)
        for record in records
        if record["test_accuracy"] is not None
    )


def first_reached(run: SeedRun, accuracy: float) -> float | None:
    """Seconds until an epoch's evaluation first gave at least this accuracy."""
    return next((seen.seconds for seen in run.epochs if seen.accuracy >= accuracy), None)


def summarize_target(runs: Sequence[SeedRun], accuracy: float) -> TargetTimes:
    """The times of all seeds to one accuracy."""
    seconds = tuple(first_reached(run, accuracy) for run in runs)
    reached = [value for value in seconds if value is not None]
    whole = spread_of(reached) if len(reached) == len(runs) else None
    return TargetTimes(
        accuracy,
        num_reached=len(reached),
        seconds_mean=None if whole is None else whole.mean,
        seconds_std=None if whole is None else whole.std,
        seconds=seconds,
    )


def spread_of(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of one value or more."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
