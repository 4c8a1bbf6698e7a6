"""The output of `bncli history`."""

import dataclasses
from collections.abc import Iterator

from bncli.cli.tables.csv_rows import Row
from bncli.cli.tables.layer_table import show_layer_table
from bncli.cli.tables.table import console_for_results, number, print_wrapped, show_lines
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
    print_wrapped(console, f"{found.run_dir}: {what}", style="bold")
    ends = ("first", "last") if last > first else ("last",)
    picked = [(layer.epochs[0], layer.epochs[-1])[-len(ends) :] for layer in found.layers]
    columns = {}
    for at, end in enumerate(ends):
        columns[f"mean shift\n{end} epoch"] = [
            number(points[at].mean_shift_in_batch_deviations) for points in picked
        ]
    for at, end in enumerate(ends):
        columns[f"variance ratio\n{end} epoch"] = [number(points[at].var_ratio) for points in picked]
    show_layer_table(console, [layer.name for layer in found.layers], columns)
    console.print()
    meanings = {
        "mean shift": "running_mean minus the mean of the epoch's batches, in standard deviations",
        "variance ratio": "running_var divided by the batches' variance; 1 is equal",
    }
    if any("-" in cells for cells in columns.values()):
        meanings["-"] = "unknown: the layer was frozen, its momentum is 0, or it ran twice in a step"
    show_lines(console, meanings)
    console.print()
    print_wrapped(console, found.verdict, style="bold")
