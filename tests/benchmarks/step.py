"""The training step of this tree beside that of an earlier commit: images/s and the peak of memory.

The commit's files go into a temporary folder. Both trees take the same steps, of full-sized images, in
processes of their own and in turns; what a process does before its third step counts for memory alone.
"""

import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bncli.cli.app import main
from bncli.cli.options import JsonOption, SetOption
from bncli.cli.progress import ProgressReporter
from bncli.cli.tables.table import console_for_results, machine_line, print_json, show_lines, table_of
from bncli.errors import BncliError
from bncli.hardware import describe_machine
from bncli.wording import plural
from tests.benchmarks.child_process import run_child

app = typer.Typer(add_completion=False, rich_markup_mode=None)

ROOT = Path(__file__).parent.parent.parent
ON_CIFAR10 = ("speedrun", "cifar10")
BEFORE = "fb061d4"  # 26 November 2026, the last one whose step was measured on an undisturbed machine


@dataclass(frozen=True)
class StepRatio:
    """One configuration in both trees."""

    config: str
    images_per_second: float  # of this tree, median over the rounds
    images_per_second_before: float
    ratio: float  # median of the ratios within a round
    ratio_min: float
    ratio_max: float
    peak_mib: float  # of this tree, the largest
    peak_mib_before: float
    by_patches: tuple[str, ...]  # the layers whose weights' gradients this tree computes by patches


@dataclass(frozen=True)
class StepBench:
    """What was measured."""

    commit: str
    num_rounds: int
    steps_per_round: int
    threads: int
    precision: str
    configs: tuple[StepRatio, ...]
    machine: dict[str, Any]


def bench_step(
    configs: Sequence[str],
    overrides: Sequence[str],
    *,
    data_root: str = "data",
    commit: str = BEFORE,
    num_rounds: int = 5,
    steps_per_round: int = 10,
    report: Callable[[str], None] = lambda _: None,
) -> StepBench:
    """Measure one configuration after the other.

    Raises:
        BncliError: the commit is not there, or a process fails.
    """
    ratios, found = [], {}
    with tempfile.TemporaryDirectory(prefix="bncli-bench-") as folder:
        before = Path(folder)
        _unpack(commit, before)
        for config in configs:
            rounds, changes = [], list(overrides)
            if config in ON_CIFAR10:
                changes.append(f"data.root={Path(data_root).absolute()}")
            for number in range(num_rounds):
                trees = (before, ROOT) if number % 2 == 0 else (ROOT, before)
                found = {tree: _run(tree, config, changes, steps_per_round) for tree in trees}
                rounds.append((found[ROOT], found[before]))
                report(
                    f"{config}, round {number + 1} of {num_rounds}:"
                    f" {found[ROOT]['images_per_second']:,.0f} images/s,"
                    f" before {found[before]['images_per_second']:,.0f}"
                )
            ratios.append(_ratio_of(config, rounds))
        now = found[ROOT]
    return StepBench(
        commit=commit,
        num_rounds=num_rounds,
        steps_per_round=steps_per_round,
        threads=now["threads"],
        precision=now["precision"],
        configs=tuple(ratios),
        machine=describe_machine(),
    )


def _unpack(commit: str, folder: Path) -> None:
    """Put the files of a commit of this repository into a folder."""
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, "bncli", "configs"]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        raise BncliError(f"--commit {commit}: git is needed, and not installed") from None
    if done.returncode:
        first, *_ = done.stderr.decode(errors="replace").splitlines() or [f"git ended with {done.returncode}"]
        raise BncliError(f"--commit {commit}: {first[:200]}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(folder, filter="data")


def _run(tree: Path, config: str, overrides: Sequence[str], num_steps: int) -> dict[str, Any]:
    """What the worker prints with the `bncli` of a tree, and with its configuration of that name."""
    named = tree / "configs" / f"{config}.yaml"
    path = named if named.is_file() else Path(config).absolute()
    worker = Path(__file__).with_name("step_worker.py")
    # by the folder first in its path: the tree before all that is installed
    code = f"import sys; sys.path.insert(0, {str(tree)!r}); import runpy; sys.argv = sys.argv[1:]"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_child([sys.executable, "-c", code, str(worker), str(path), str(num_steps), *overrides])
    if done.code:
        last = (done.message.splitlines() or [""])[-1]
        raise BncliError(f"{config} in {tree} ended with {done.code}: {last[-300:]}")
    result: dict[str, Any] = json.loads(done.output)
    return result


def _ratio_of(config: str, rounds: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> StepRatio:
    """Of the rounds of this tree and of the one before."""
    ratios = [now["images_per_second"] / before["images_per_second"] for now, before in rounds]
    return StepRatio(
        config=config,
        images_per_second=statistics.median(now["images_per_second"] for now, _ in rounds),
        images_per_second_before=statistics.median(before["images_per_second"] for _, before in rounds),
        ratio=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        peak_mib=max(now["peak_mib"] for now, _ in rounds),
        peak_mib_before=max(before["peak_mib"] for _, before in rounds),
        by_patches=tuple(rounds[-1][0]["by_patches"]),
    )


@app.command()
def run(
    configs: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG]...", help="Built-in names, or YAML files.")
    ] = None,
    overrides: SetOption = None,
    data_root: Annotated[
        str, typer.Option(help="Folder of cifar-10-batches-py, for the configurations that use it.")
    ] = "data",
    commit: Annotated[str, typer.Option(help="The commit to compare with.")] = BEFORE,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Processes of each tree, in turns.")] = 5,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Training steps in a process.")] = 10,
    as_json: JsonOption = False,
) -> int:
    """Compare the training step with that of an earlier commit, in alternating processes."""
    chosen = configs or ["speedrun", "cifar10", "quickstart"]
    with ProgressReporter() as progress:
        result = bench_step(
            chosen,
            overrides or [],
            data_root=data_root,
            commit=commit,
            num_rounds=rounds,
            steps_per_round=steps,
            report=progress.note,
        )
    print_json(result) if as_json else show_step_bench(result)
    return 0


def show_step_bench(result: StepBench) -> None:
    console = console_for_results()
    show_lines(
        console,
        {
            "machine": machine_line(result.machine),
            "runtime": f"{result.precision.removeprefix('torch.')}, {plural(result.threads, 'thread')}",
            "before": f"commit {result.commit}",
        },
    )
    console.print()
    table = table_of(None, "config", "images/s", "before", "ratio", "from", "to", "MiB", "before", "patches")
    for each in result.configs:
        table.add_row(
            Path(each.config).stem,
            f"{each.images_per_second:,.0f}",
            f"{each.images_per_second_before:,.0f}",
            *(f"{ratio:.3f}" for ratio in (each.ratio, each.ratio_min, each.ratio_max)),
            f"{each.peak_mib:,.0f}",
            f"{each.peak_mib_before:,.0f}",
            str(len(each.by_patches)),
        )
    console.print(table)
    console.print(
        f"medians of n = {plural(result.num_rounds, 'process', 'processes')} of"
        f" {plural(result.steps_per_round, 'step')} in turns; patches: layers"
    )


if __name__ == "__main__":
    sys.exit(main(program=app, name="python -m tests.benchmarks.step"))
