"""What `exact` takes by the clock, beside a plain forward pass in eval mode over the same batches, in turns.

A small memory for what is kept stands for many images: with `--memory 0` all of it goes to disk, whose size
can be limited per image. The network is one of torchvision's with random weights.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from bncli.batchnorm import Population, batch_norm_layers, measure_population
from bncli.batchnorm.population.exact import kept, spill
from bncli.cli.app import main
from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption
from bncli.cli.tables.table import console_for_results, machine_line, print_json, show_lines, table_of
from bncli.hardware import describe_machine
from bncli.wording import plural
from tests.benchmarks.population import PassTime, in_turns, network_of, plain_forward

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True)
class ExactBench:
    """What was measured."""

    network: str
    num_layers: int
    num_images: int
    image_size: int
    batch_size: int
    num_rounds: int
    memory_bytes: int  # for what is kept
    disk_bytes: int
    used_bytes: int  # of the disk, at most
    num_passes: int
    forward_passes: float  # in FLOPs
    times: tuple[PassTime, ...]
    threads: int
    machine: dict[str, Any]


def bench_exact(
    *,
    network: str,
    num_rounds: int,
    num_images: int,
    batch_size: int,
    image_size: int,
    memory_bytes: int,
    disk_bytes: int | None,
    report: Callable[[str], None],
) -> ExactBench:
    """Time `exact` and a plain forward pass in turns, after one round to warm up."""
    model = network_of(network, image_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, 3, image_size, image_size, generator=generator)
    batches = list(images.split(batch_size))
    found: list[Population] = []
    usable = spill.usable_bytes() if disk_bytes is None else disk_bytes
    with _room(memory_bytes, usable) as used:
        tools: dict[str, Callable[[], object]] = {
            "plain forward": lambda: plain_forward(model, batches),
            "bncli exact": lambda: found.append(measure_population(model, batches)),
        }
        times = in_turns(tools, num_rounds, report)
    return ExactBench(
        network=f"torchvision {network}",
        num_layers=len(batch_norm_layers(model)),
        num_images=num_images,
        image_size=image_size,
        batch_size=batch_size,
        num_rounds=num_rounds,
        memory_bytes=memory_bytes,
        disk_bytes=usable,
        used_bytes=max(used, default=0),
        num_passes=found[-1].num_passes,
        forward_passes=found[-1].forward_passes,
        times=times,
        threads=torch.get_num_threads(),
        machine=describe_machine(),
    )


@contextmanager
def _room(memory_bytes: int, disk_bytes: int) -> Iterator[list[int]]:
    """Let so much be kept; gives the sizes of the files when they are closed."""
    sizes: list[int] = []
    close = spill.SpillFile.close

    def watched(self: spill.SpillFile) -> None:
        sizes.append(self._num_bytes)
        close(self)

    with (
        mock.patch.object(kept, "MAX_BYTES", memory_bytes),
        mock.patch.object(spill, "usable_bytes", lambda: disk_bytes),
        mock.patch.object(spill.SpillFile, "close", watched),
    ):
        yield sizes


@app.command()
def run(
    network: Annotated[str, typer.Option(metavar="NAME", help="A classifier of torchvision's.")] = "resnet50",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of both, in turns.")] = 3,
    images: Annotated[int, typer.Option(min=2, max=100_000, help="Images in a pass.")] = 256,
    batch_size: Annotated[int, typer.Option(min=2, max=10_000, help="Images in a batch.")] = 32,
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="Height and width in pixels.")] = 224,
    memory: Annotated[float, typer.Option(min=0, help="MiB of memory for what is kept.")] = 1024,
    disk: Annotated[
        float | None, typer.Option(min=0, help="MiB on disk an image. Default: half of what is free.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Time recalibration by the method exact beside a plain forward pass."""
    result = bench_exact(
        network=network,
        num_rounds=rounds,
        num_images=images,
        batch_size=batch_size,
        image_size=image_size,
        memory_bytes=int(memory * 2**20),
        disk_bytes=None if disk is None else int(disk * 2**20 * images),
        report=print_note,
    )
    print_json(result) if as_json else show_exact_bench(result)
    return 0


def show_exact_bench(result: ExactBench) -> None:
    """The times, then what they were measured on."""
    console = console_for_results()
    show_lines(console, {"machine": machine_line(result.machine)})
    console.print()
    table = table_of("One measurement, in turns", "tool", "seconds", "ratio", "from", "to")
    for one in result.times:
        ratios = (f"{value:.2f}" for value in (one.ratio, one.ratio_min, one.ratio_max))
        table.add_row(one.tool, f"{one.seconds:.2f}", *ratios)
    console.print(table)
    console.print()
    used = result.used_bytes / 2**20
    show_lines(
        console,
        {
            "network": f"{result.network}, {result.num_layers} BatchNorm layers",
            "images": f"{result.num_images:,} of {result.image_size}x{result.image_size},"
            f" in batches of {result.batch_size}; {plural(result.threads, 'thread')}",
            "ratio": f"to the plain forward pass, in eval mode; median of n = {result.num_rounds} rounds",
            "exact": f"{result.forward_passes:.2f} forward passes in FLOPs, {result.num_passes} passes",
            "kept": f"in {result.memory_bytes / 2**20:,.0f} MiB of memory, and {used:,.0f} MiB on disk of"
            f" {result.disk_bytes / 2**20:,.0f}",
        },
    )


if __name__ == "__main__":
    sys.exit(main(program=app, name="python -m tests.benchmarks.exact"))
