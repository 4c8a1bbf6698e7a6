"""What a training run takes: images/s by the size of the data set, memory, and time to the first step.

Sizes are made from the configured images, taken again and again in their order, so that only the number
changes. Memory and start are measured on `bncli train` itself, in processes of their own; the start beside
one that imports torch and reads the same files, in turns.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bncli.cli.app import main
from bncli.cli.opened_checkpoint import open_config
from bncli.cli.options import ConfigArgument, JsonOption, SetOption
from bncli.cli.progress import ProgressReporter
from bncli.cli.tables.table import (
    console_for_results,
    machine_line,
    print_json,
    runtime_line,
    show_lines,
    table_of,
)
from bncli.config import Cifar10Config, Config
from bncli.config_file import dump_config
from bncli.data import BatchPlan, Split, cifar10_files, training_batches
from bncli.data import Progress as DataProgress
from bncli.data.user_path import user_path
from bncli.errors import BncliError, ConfigError
from bncli.hardware import describe_machine
from bncli.runtime import synchronize
from bncli.training import Setup, prepare
from bncli.training.last_good_step import LastGoodStep
from bncli.training.loop import take_step
from bncli.training.run import Run
from tests.benchmarks.child_process import BNCLI, run_child

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_READ = "import pickle, pathlib, sys; files = [pickle.loads(p.read_bytes(), encoding='latin1') for p in"
_READ += " pathlib.Path(sys.argv[1]).glob('*_batch*')]"


@dataclass(frozen=True)
class SizeRate:
    """Training on one number of images."""

    num_images: int
    images_per_second: float  # median over the rounds
    ratio: float  # to the first size, median of the ratios within a round
    ratio_min: float
    ratio_max: float


@dataclass(frozen=True)
class ScaleBench:
    """What was measured."""

    sizes: tuple[SizeRate, ...]
    num_rounds: int
    steps_per_round: int
    batch_size: int
    num_train_images: int  # of the runs below
    peak_memory_gib: float  # resident, of `bncli train` for one epoch with its evaluation and checkpoints
    start_seconds: float  # of `bncli train` until its first step is next, median
    plain_start_seconds: float  # of importing torch and reading the data, median
    start_ratio: float  # median of the ratios of neighbouring rounds
    start_ratio_min: float
    start_ratio_max: float
    num_starts: int
    reads_data: bool  # whether the plain start has files to read
    runtime: dict[str, Any]
    machine: dict[str, Any]


def bench_scale(
    config: Config,
    *,
    sizes: Sequence[int],
    num_rounds: int = 5,
    steps_per_round: int = 4,
    num_starts: int = 5,
    data_progress: DataProgress | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> ScaleBench:
    """Measure all three, one after the other.

    Raises:
        BncliError: when the configuration cannot be trained here.
    """
    # first, while this process is small: Linux counts the parent's memory at the child's start as its own
    with tempfile.TemporaryDirectory(prefix="bncli-bench-") as folder:
        path = Path(folder) / "config.yaml"
        epoch = config.train.model_copy(update={"epochs": 1})
        path.write_text(dump_config(config.model_copy(update={"train": epoch})))
        starts = _measure_starts(path, config, num_starts, report)
        report("memory of one epoch ...")
        peak = _peak_memory(path)
    augment = config.augment.at_full_size()  # in every round
    setup = prepare(config.model_copy(update={"augment": augment}), progress=data_progress)
    rates = _measure_sizes(setup, sizes, num_rounds, steps_per_round, report)
    ratios = [ours / plain for ours, plain in starts]
    return ScaleBench(
        sizes=rates,
        num_rounds=num_rounds,
        steps_per_round=steps_per_round,
        batch_size=setup.plan.batch_size,
        num_train_images=len(setup.dataset.train),
        peak_memory_gib=peak,
        start_seconds=statistics.median(ours for ours, _ in starts),
        plain_start_seconds=statistics.median(plain for _, plain in starts),
        start_ratio=statistics.median(ratios),
        start_ratio_min=min(ratios),
        start_ratio_max=max(ratios),
        num_starts=num_starts,
        reads_data=isinstance(config.data, Cifar10Config),
        runtime=setup.runtime.describe_training(),
        machine=describe_machine(),
    )


def _measure_sizes(
    setup: Setup, sizes: Sequence[int], num_rounds: int, num_steps: int, report: Callable[[str], None]
) -> tuple[SizeRate, ...]:
    """All sizes in turns, after one round each to warm up; every second round backwards."""
    loops = [_rates(_resized(setup, size), num_steps) for size in sizes]
    for loop in loops:
        next(loop)
    rounds: list[list[float]] = []
    for number in range(num_rounds):
        order = range(len(loops)) if number % 2 == 0 else reversed(range(len(loops)))
        found = {index: next(loops[index]) for index in order}
        rounds.append([found[index] for index in range(len(loops))])
        rates = ", ".join(f"{rate:,.0f}" for rate in rounds[-1])
        report(f"round {number + 1} of {num_rounds}: {rates} images/s")
    result = []
    for index, size in enumerate(sizes):
        ratios = [rates[index] / rates[0] for rates in rounds]
        rate = statistics.median(rates[index] for rates in rounds)
        result.append(SizeRate(size, rate, statistics.median(ratios), min(ratios), max(ratios)))
    return tuple(result)


def _resized(setup: Setup, size: int) -> Setup:
    """The same run on `size` training images: the first ones, again and again if there are too few."""
    where = torch.arange(size) % len(setup.dataset.train)
    train = setup.dataset.train
    train = Split(train.images[where], train.labels[where])
    plan = BatchPlan(size, setup.plan.batch_size, setup.plan.last_batch, setup.plan.min_batch)
    return replace(setup, dataset=replace(setup.dataset, train=train), plan=plan)


def _rates(setup: Setup, num_steps: int) -> Iterator[float]:
    """Images per second of `num_steps` steps of bncli's loop from the start of an epoch, again and again."""
    run = Run.start(setup)
    run.model.train()
    last_good = LastGoodStep(run)
    while True:
        config = setup.config
        batches = training_batches(
            setup.train_split,
            setup.plan,
            config.augment,
            seed=config.train.seed,
            epoch=run.epoch,
            fill=setup.normalization.mean,
        )
        # the epoch's order is drawn here: it is paid once for all steps of an epoch, not for these few
        images, labels = next(batches)
        num_images, start = 0, time.perf_counter()
        for _ in range(num_steps):
            take_step(run, last_good, images, labels)
            num_images += len(labels)
            images, labels = next(batches, (images, labels))
        synchronize(setup.runtime.device)
        yield num_images / (time.perf_counter() - start)
        run.epoch += 1
        run.step = 0


def _measure_starts(
    path: Path, config: Config, num_starts: int, report: Callable[[str], None]
) -> list[tuple[float, float]]:
    """Seconds of `bncli train` to its first step, and of the plain start, in turns; one pair to warm up."""
    found = []
    for number in range(num_starts + 1):
        found.append((_start_of_train(path, path.parent / f"start-{number}"), _plain_start(config)))
        if number:
            report(f"start {number} of {num_starts}: {found[-1][0]:.2f} s, plain {found[-1][1]:.2f} s")
    return found[1:]


def _start_of_train(path: Path, run_dir: Path) -> float:
    message = ""
    start = time.perf_counter()
    with subprocess.Popen(
        [*BNCLI, "train", str(path), "--run-dir", str(run_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("Training on"):  # printed when the first step is next
                    return time.perf_counter() - start
                message = line
        finally:
            process.kill()
    raise BncliError(f"bncli train ended before its first step: {message.strip()}")


def _plain_start(config: Config) -> float:
    data = config.data
    read, arguments = "", []
    if isinstance(data, Cifar10Config):
        folders = cifar10_files.batch_folders(user_path(data.root, "data.root"))
        read, arguments = _READ, [str(folder) for folder in islice(folders, 1)]
    code = f"import torch, warnings; warnings.simplefilter('ignore'); {read}\nprint('read', flush=True)"
    command = [sys.executable, "-c", code, *arguments]
    start = time.perf_counter()
    # until it is ready, as above: to end the process takes time of its own
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        is_ready = process.stdout.readline() == "read\n"
        seconds = time.perf_counter() - start
    if not is_ready:
        raise BncliError("the plain start ended before it had read the data")
    return seconds


def _peak_memory(path: Path) -> float:
    """GiB of resident memory of `bncli train` at most."""
    done = run_child([*BNCLI, "train", str(path), "--run-dir", str(path.parent / "run")])
    if done.code:
        raise BncliError(f"bncli train ended with {done.code}: {done.message[-500:]}")
    return done.peak_mib / 2**10


@app.command()
def run(
    config: ConfigArgument,
    overrides: SetOption = None,
    sizes: Annotated[str, typer.Option(help="Numbers of training images.")] = "10000,50000,200000",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of all sizes, in turns.")] = 5,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Training steps in a round.")] = 4,
    starts: Annotated[int, typer.Option(min=1, max=1000, help="Starts of bncli train, in turns.")] = 5,
    as_json: JsonOption = False,
) -> int:
    """Measure speed by the size of the data set, peak memory, and the time to the first step."""
    loaded = open_config(config, overrides)
    with ProgressReporter() as progress:
        result = bench_scale(
            loaded,
            sizes=_parse_sizes(sizes, loaded.train.batch_size * (steps + 1)),
            num_rounds=rounds,
            steps_per_round=steps,
            num_starts=starts,
            data_progress=progress,
            report=progress.note,
        )
    print_json(result) if as_json else show_scale_bench(result)
    return 0


def _parse_sizes(text: str, smallest: int) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError("--sizes", [f"{text!r}: expected numbers of images such as 10000,50000"]) from None
    if not all(smallest <= size <= 10_000_000 for size in sizes):
        found = f"{text}: expected {smallest:,} to 10,000,000 images, so that an epoch has enough steps"
        raise ConfigError("--sizes", [f"{found}; or set --steps or train.batch_size lower"])
    return sizes


def show_scale_bench(result: ScaleBench) -> None:
    console = console_for_results()
    read = "reading the same files" if result.reads_data else "nothing to read"
    lines = {
        "machine": machine_line(result.machine),
        "runtime": runtime_line(result.runtime),
        "memory": f"{result.peak_memory_gib:.2f} GiB at most, one epoch of bncli train on"
        f" {result.num_train_images:,} images (n = 1)",
        "start": f"{result.start_seconds:.2f} s to the first step; import torch and {read}:"
        f" {result.plain_start_seconds:.2f} s",
        "ratio": f"{result.start_ratio:.2f}, from {result.start_ratio_min:.2f} to"
        f" {result.start_ratio_max:.2f} (median of n = {result.num_starts} starts in turns)",
    }
    show_lines(console, lines)
    table = table_of(None, "images", "images/s", "ratio", "from", "to", left=0)
    for size in result.sizes:
        spread = (f"{size.ratio:.3f}", f"{size.ratio_min:.3f}", f"{size.ratio_max:.3f}")
        table.add_row(f"{size.num_images:,}", f"{size.images_per_second:,.0f}", *spread)
    console.print()
    console.print(table)
    console.print(
        f"medians of n = {result.num_rounds} rounds of {result.steps_per_round} steps in turns,"
        f" batch {result.batch_size}; ratios to the first size"
    )


if __name__ == "__main__":
    sys.exit(main(program=app, name="python -m tests.benchmarks.scale"))
