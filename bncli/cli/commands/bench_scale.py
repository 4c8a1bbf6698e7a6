"""`bncli bench scale`: what a training run takes, in images/s by size, memory, and time to its first step."""

from typing import TYPE_CHECKING, Annotated

import typer

from bncli.cli.messages import print_note
from bncli.cli.options import ConfigArgument, JsonOption, SetOption
from bncli.errors import ConfigError

if TYPE_CHECKING:
    from bncli.bench.scale import ScaleBench


def bench_scale_of_training(
    config: ConfigArgument,
    overrides: SetOption = None,
    sizes: Annotated[str, typer.Option(help="Numbers of training images.")] = "10000,50000,200000",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of all sizes, in turns.")] = 5,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Training steps in a round.")] = 4,
    starts: Annotated[int, typer.Option(min=1, max=1000, help="Starts of bncli train, in turns.")] = 5,
    as_json: JsonOption = False,
) -> int:
    """Measure speed by the size of the data set, peak memory, and the time to the first step."""
    from bncli.bench import bench_scale
    from bncli.cli.progress import DataReporter
    from bncli.cli.subject import open_config
    from bncli.cli.tables.table import print_json

    loaded = open_config(config, overrides)
    result = bench_scale(
        loaded,
        sizes=_parse_sizes(sizes, loaded.train.batch_size * (steps + 1)),
        num_rounds=rounds,
        steps_per_round=steps,
        num_starts=starts,
        data_progress=DataReporter(),
        report=print_note,
    )
    print_json(result) if as_json else _show(result)
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


def _show(result: "ScaleBench") -> None:
    from bncli.cli.tables.table import console_for_results, machine_line, runtime_line, show_lines, table_of

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
