"""The output of `bncli history`."""

import dataclasses
from collections.abc import Iterator

from bncli.cli.messages import one_line
from bncli.cli.tables.csv_rows import Row
from bncli.cli.tables.table import console_for_results, number, print_wrapped, show_lines, table_of
from bncli.training.convergence import Convergence
from bncli.wording import plural


def convergence_rows(found: Convergence) -> Iterator[Row]:
    """The rows of the CSV file: one per layer and epoch."""
    for layer in found.layers:
        for point in layer.epochs:
            yield {"layer": layer.name, **dataclasses.asdict(point)}


def show_convergence(found: Convergence) -> None:
    """One row per layer, its first and its last epoch, and the verdict."""
    console = console_for_results()
    first, last = found.epochs[0], found.epochs[-1]
    what = f"{plural(len(found.layers), 'BatchNorm layer')}, epoch {first}" + (
        f" to {last}" if last > first else ""
    )
    console.print(f"{one_line(found.run_dir)}: {what}", style="bold")
    ends = ("first", "last") if last > first else ("last",)
    headers = [f"{name}\n{end}" for name in ("mean shift", "variance ratio") for end in ends]
    table = table_of(None, "layer", *headers)
    for layer in found.layers:
        points = (layer.epochs[0], layer.epochs[-1])[-len(ends) :]
        shifts = [number(point.mean_shift_in_batch_deviations) for point in points]
        ratios = [number(point.var_ratio) for point in points]
        table.add_row(one_line(layer.name), *shifts, *ratios)
    console.print(table)
    console.print()
    meanings = {
        "mean shift": "of running_mean, in deviations of the epoch's batches",
        "variance ratio": "running_var over the batches', eps added to both; 1 is a match",
        "-": "could not be recovered: frozen, run twice in a step, momentum 0",
    }
    show_lines(console, meanings)
    console.print()
    print_wrapped(console, found.verdict, style="bold")
