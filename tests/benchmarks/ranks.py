"""Population statistics by two processes of one thread each against one process with one thread, and two.

Each measurement is timed inside its process, from a moment when all are ready until all are done, so that
what starting Python and torchrun takes does not count. The processes are started in turns.
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from bncli.cli.app import main
from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption
from bncli.cli.tables.table import console_for_results, machine_line, print_json, show_lines, table_of
from bncli.errors import BncliError
from bncli.hardware import describe_machine
from tests.benchmarks.child_process import run_child
from tests.benchmarks.population import network_of

app = typer.Typer(add_completion=False, rich_markup_mode=None)

WORKER = "tests.benchmarks.ranks_worker"
ONE, TWO_THREADS, TWO_RANKS = "one process, 1 thread", "one process, 2 threads", "two ranks, 1 thread each"
REPEATS = 3  # in a process; the fastest counts


@dataclass(frozen=True)
class Way:
    """One way to measure the same images. Ratios are of images/s, to one process with one thread."""

    name: str
    images_per_second: float  # median over the rounds
    ratio: float  # median over the rounds
    ratio_min: float
    ratio_max: float
    peak_mib: float  # of the largest of its processes, the largest round


@dataclass(frozen=True)
class RanksBench:
    """What was measured."""

    network: str
    method: str
    num_images: int
    image_size: int
    batch_size: int
    num_rounds: int
    ways: tuple[Way, ...]
    machine: dict[str, Any]


def bench_ranks(
    *,
    network: str,
    method: Literal["exact", "precise"],
    num_rounds: int,
    num_images: int,
    batch_size: int,
    image_size: int,
    report: Callable[[str], None],
) -> RanksBench:
    """Start each way in each round, in turns. Raises BncliError for a network that there is not."""
    network_of(network, image_size)
    words = [
        *("-m", WORKER, "--network", network, "--method", method, "--repeats", str(REPEATS)),
        *("--num-images", str(num_images), "--batch-size", str(batch_size), "--image-size", str(image_size)),
    ]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ways = {
        ONE: (sys.executable, *words, "--threads", "1"),
        TWO_THREADS: (sys.executable, *words, "--threads", "2"),
        TWO_RANKS: (sys.executable, *torchrun, *words, "--threads", "1"),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1, num_rounds + 1):
        for name, command in ways.items():
            done = run_child(command)
            if done.code:
                raise BncliError(f"{name}: ended with code {done.code}: {done.message[-500:]}")
            found = json.loads(done.output)
            speeds[name].append(num_images / min(found["seconds"]))
            peaks[name].append(max(found["peak_mib"]))
        report(f"round {turn} of {num_rounds}")
    return RanksBench(
        network=f"torchvision {network}",
        method=method,
        num_images=num_images,
        image_size=image_size,
        batch_size=batch_size,
        num_rounds=num_rounds,
        ways=tuple(_way(name, speeds[name], speeds[ONE], max(peaks[name])) for name in ways),
        machine=describe_machine(),
    )


def _way(name: str, speeds: list[float], base: list[float], peak_mib: float) -> Way:
    ratios = [one / other for one, other in zip(speeds, base, strict=True)]
    return Way(name, statistics.median(speeds), statistics.median(ratios), min(ratios), max(ratios), peak_mib)


@app.command()
def run(
    network: Annotated[str, typer.Option(metavar="NAME", help="A classifier of torchvision's.")] = "resnet18",
    method: Annotated[Literal["exact", "precise"], typer.Option(help="Of `recalibrate`.")] = "precise",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of all ways, in turns.")] = 3,
    images: Annotated[int, typer.Option(min=4, max=100_000, help="Images in a pass.")] = 256,
    batch_size: Annotated[int, typer.Option(min=2, max=10_000, help="Images in a batch.")] = 32,
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="Height and width in pixels.")] = 128,
    as_json: JsonOption = False,
) -> int:
    """Time population statistics by two processes against one."""
    result = bench_ranks(
        network=network,
        method=method,
        num_rounds=rounds,
        num_images=images,
        batch_size=batch_size,
        image_size=image_size,
        report=print_note,
    )
    print_json(result) if as_json else show_ranks_bench(result)
    return 0


def show_ranks_bench(result: RanksBench) -> None:
    """The speeds, then what they were measured on."""
    console = console_for_results()
    show_lines(console, {"machine": machine_line(result.machine)})
    console.print()
    table = table_of(f"Measuring by {result.method}", "way", "images/s", "ratio", "from", "to", "MiB")
    for one in result.ways:
        ratios = (f"{value:.2f}" for value in (one.ratio, one.ratio_min, one.ratio_max))
        table.add_row(one.name, f"{one.images_per_second:,.1f}", *ratios, f"{one.peak_mib:,.0f}")
    console.print(table)
    console.print()
    show_lines(
        console,
        {
            "network": result.network,
            "images": f"{result.num_images:,} of {result.image_size}x{result.image_size},"
            f" in batches of {result.batch_size}",
            "ratio": f"to one process with one thread; median of n = {result.num_rounds} rounds",
            "MiB": "of memory at the peak, in the largest of the processes",
        },
    )


if __name__ == "__main__":
    sys.exit(main(program=app, name="python -m tests.benchmarks.ranks"))
