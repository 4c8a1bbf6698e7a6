"""Seconds to an accuracy on the test split: `bncli train` in a fresh process for each seed, watched.

The clock starts with the process, so interpreter, imports and the reading of the data are included. It is
read when an epoch's line appears in metrics.jsonl, about 20 ms late at most.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import bncli
from bncli.bench.training_step import matrix_gflops
from bncli.cli.app import main
from bncli.cli.messages import print_error, print_note
from bncli.cli.opened_checkpoint import open_config
from bncli.cli.options import ConfigArgument, JsonOption, SetOption
from bncli.cli.stop_signals import StopSignals
from bncli.cli.tables.table import (
    console_for_results,
    machine_line,
    print_json,
    runtime_line,
    show_lines,
    table_of,
)
from bncli.config_file import load_config
from bncli.errors import BncliError, ConfigError
from bncli.hardware import describe_machine
from bncli.runtime import resolve_runtime
from tests.benchmarks.child_process import BNCLI, Finished, run_child
from tests.benchmarks.time_to_accuracy import (
    EpochSeen,
    SeedRun,
    Spread,
    TargetTimes,
    parse_epochs,
    spread_of,
    summarize_target,
)

app = typer.Typer(add_completion=False, rich_markup_mode=None)


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
    """The commit of the checkout that bncli runs from, with `-dirty` where files were changed."""
    package = Path(bncli.__file__)
    git = ["git", "-C", str(package.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", str(package)], capture_output=True, check=True)
        found = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


@app.command()
def run(
    config: ConfigArgument,
    target: Annotated[str, typer.Option(metavar="A,A,...", help="Accuracies, as fractions such as 0.9.")],
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs, with the seeds 0 to N-1.")] = 3,
    overrides: SetOption = None,
    tta: Annotated[
        Literal["flip", "shifts"] | None,
        typer.Option("--tta", help="Evaluate the end of each run over views as well, apart."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Time `bncli train` from the start of its process to each accuracy, over several seeds."""
    targets = parse_targets(target)
    open_config(config, overrides)  # what nobody can run is refused before a process is started
    with StopSignals() as signals:
        try:
            result = bench_accuracy(config, targets, seeds, overrides or (), views=tta, report=_report)
        except KeyboardInterrupt:
            print_error("interrupted")
            return signals.exit_code
    print_json(result) if as_json else show_accuracy_bench(result)
    return 0


def parse_targets(text: str) -> tuple[float, ...]:
    """Accuracies such as "0.80,0.9", in rising order, each once.

    Raises ConfigError for anything but fractions between 0 and 1, both excluded.
    """
    try:
        found = {float(part) for part in text.split(",")}
    except ValueError:
        found = set()
    if not found or not all(0 < value < 1 for value in found):
        wanted = f"expected accuracies above 0 and below 1, such as 0.80,0.85,0.90, found {text!r}"
        raise ConfigError("--target", [wanted])
    return tuple(sorted(found))


def _report(run: SeedRun) -> None:
    print_note(
        f"seed {run.seed}: accuracy {run.accuracy:.2%} after {run.epochs[-1].epoch} epochs,"
        f" {run.seconds:.1f} s, {run.peak_mib:,.0f} MiB"
    )


def show_accuracy_bench(result: AccuracyBench) -> None:
    """Seconds to each accuracy, then what they were measured on."""
    console = console_for_results()
    num_seeds = len(result.seeds)
    table = table_of(None, "accuracy", "reached", "seconds")
    for target in result.targets:
        seconds = _plus_minus(target.seconds_mean, target.seconds_std, "{:.1f}")
        table.add_row(f"{target.accuracy:.2%}", f"{target.num_reached} of {num_seeds}", seconds)
    console.print(table)
    console.print()
    lines = {
        "seconds": "from the start of the process to the evaluation that first reached it",
        "final accuracy": _plus_minus(result.final.mean, result.final.std, "{:.2%}"),
        "seeds": f"n = {num_seeds}; mean ± standard deviation where all of them reached it",
        "peak memory": f"{max(run.peak_mib for run in result.seeds):,.0f} MiB, the largest of the runs",
        "machine": machine_line(result.machine),
        "runtime": f"{runtime_line(result.runtime)}; {result.peak_gflops_per_second:,.0f} GFLOP/s, the best"
        " 2048x2048 matrix product",
        "commit": result.commit or "not in a checkout",
        "each run": result.command,
    }
    if result.tta is not None:
        accuracy, cost = result.tta.accuracy, result.tta.seconds
        lines[f"--tta {result.tta.views}"] = (
            f"{_plus_minus(accuracy.mean, accuracy.std, '{:.2%}')} in"
            f" {_plus_minus(cost.mean, cost.std, '{:.1f}')} s more; the numbers above are without it"
        )
    show_lines(console, lines)


def _plus_minus(mean: float | None, std: float | None, form: str) -> str:
    if mean is None:
        return "-"
    return form.format(mean) if std is None else f"{form.format(mean)} ± {form.format(std)}"


if __name__ == "__main__":
    sys.exit(main(program=app, name="python -m tests.benchmarks.accuracy"))
