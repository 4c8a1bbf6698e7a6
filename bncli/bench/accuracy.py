"""Seconds to an accuracy on the test split: `bncli train` in a fresh process for each seed, watched.

The clock starts with the process, so interpreter, imports and the reading of the data are included. It is
read when an epoch's line appears in metrics.jsonl, about 20 ms late at most.
"""

import json
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bncli.bench.child_process import BNCLI, Finished, run_child
from bncli.bench.matrix_peak import matrix_gflops
from bncli.bench.time_to_accuracy import (
    EpochSeen,
    SeedRun,
    Spread,
    TargetTimes,
    parse_epochs,
    spread_of,
    summarize_target,
)
from bncli.config_file import load_config
from bncli.errors import BncliError
from bncli.hardware import describe_machine
from bncli.runtime import resolve_runtime


@dataclass(frozen=True)
class AugmentedAccuracy:
    """Test-time augmentation of the final checkpoints, in no other number of the benchmark."""

    views: str
    accuracy: Spread
    seconds: Spread  # of the pass over the views alone


@dataclass(frozen=True)
class AccuracyBench:
    """All seeds, and what they come to."""

    config: str
    command: str  # of one seed
    commit: str | None  # of the checkout that bncli runs from; None elsewhere
    machine: dict[str, Any]
    runtime: dict[str, Any]
    peak_gflops_per_second: float  # of matrix products in the runs' precision, to compare machines by
    seeds: tuple[SeedRun, ...]
    targets: tuple[TargetTimes, ...]
    final: Spread  # accuracy at the end, a fraction
    tta: AugmentedAccuracy | None  # None where not asked for


def bench_accuracy(
    config: Path,
    targets: Sequence[float],
    num_seeds: int,
    overrides: Sequence[str] = (),
    *,
    views: str | None = None,
    report: Callable[[SeedRun], None] = lambda _: None,
) -> AccuracyBench:
    """Train with the seeds 0 to num_seeds - 1, one after the other; `report` is given each as it ends.

    With `views`, `flip` or `shifts`, the final checkpoint is evaluated by `bncli eval --tta` after it.

    Raises BncliError with the last line of a run that fails, or where no temporary directory can be made.
    """
    runs = []
    for seed in range(num_seeds):
        try:
            with tempfile.TemporaryDirectory(prefix="bncli-bench-") as folder:
                runs.append(_train_seed(config, overrides, seed, Path(folder), views))
        except OSError as error:
            raise BncliError(f"{tempfile.gettempdir()}: {error.strerror or error}") from None
        report(runs[-1])
    runtime = resolve_runtime(load_config(config, list(overrides)).runtime)
    return AccuracyBench(
        config=str(config),
        command=shlex.join(["bncli", *_train_arguments(config, overrides, "K", "DIR")]),
        commit=_commit(),
        machine=describe_machine(),
        runtime=runtime.describe_training(),
        peak_gflops_per_second=matrix_gflops(runtime.device, runtime.precision),
        seeds=tuple(runs),
        targets=tuple(summarize_target(runs, accuracy) for accuracy in targets),
        final=spread_of([run.accuracy for run in runs]),
        tta=None if views is None else _augmented_accuracy(runs, views),
    )


def _train_arguments(
    config: Path, overrides: Sequence[str], seed: int | str, run_dir: Path | str
) -> list[str]:
    sets = [word for override in (*overrides, f"train.seed={seed}") for word in ("--set", override)]
    return ["train", str(config), *sets, "--run-dir", str(run_dir)]


def _train_seed(
    config: Path, overrides: Sequence[str], seed: int, folder: Path, views: str | None
) -> SeedRun:
    run_dir = folder / "run"
    epochs: list[EpochSeen] = []
    num_read = 0

    def read_metrics(seconds: float) -> None:
        nonlocal num_read
        lines, num_read = _new_lines(run_dir / "metrics.jsonl", num_read)
        epochs.extend(parse_epochs(lines, seconds))

    arguments = [*_train_arguments(config, overrides, seed, run_dir), "--json"]
    done = run_child([*BNCLI, *arguments], watch=read_metrics)
    _check(done, seed, {0})
    result = json.loads(done.output)
    accuracy = result["test_accuracy"]  # where the run recalibrates, after it
    run = SeedRun(seed, tuple(epochs), accuracy, done.seconds, done.peak_mib)
    return run if views is None else _with_views(run, result["checkpoint"], views)


def _with_views(run: SeedRun, checkpoint: str, views: str) -> SeedRun:
    """The run and what `bncli eval --tta` says of its checkpoint, with the smallest of certificates."""
    options = ["--tta", views, "--num-images", "2", "--batch-sizes", "2", "--json"]
    done = run_child([*BNCLI, "eval", checkpoint, *options])
    _check(done, run.seed, {0, 1})  # 1 is the certificate's verdict, which is not asked for here
    found = json.loads(done.output)["tta"]
    return replace(run, tta_accuracy=found["accuracy"], tta_seconds=found["seconds"])


def _augmented_accuracy(runs: Sequence[SeedRun], views: str) -> AugmentedAccuracy:
    accuracies = [run.tta_accuracy for run in runs if run.tta_accuracy is not None]
    seconds = [run.tta_seconds for run in runs if run.tta_seconds is not None]
    return AugmentedAccuracy(views, spread_of(accuracies), spread_of(seconds))


def _new_lines(path: Path, num_read: int) -> tuple[list[str], int]:
    """The whole lines after the first `num_read` bytes, and how many bytes have been read then."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(num_read)
        whole = file.read().rpartition(b"\n")[0]
        if whole:
            return whole.decode().split("\n"), num_read + len(whole) + 1
    return [], num_read


def _check(done: Finished, seed: int, accepted: set[int]) -> None:
    if done.code not in accepted:
        last_line = (done.message.splitlines() or ["(no message)"])[-1].removeprefix("bncli: error: ")
        raise BncliError(f"seed {seed}: bncli ended with {done.code}: {last_line}")


def _commit() -> str | None:
    """The commit of the checkout that this package is a part of, with `-dirty` where files were changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        found = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
