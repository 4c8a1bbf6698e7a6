"""The output of `bncli inspect-stats RUN_DIR`."""

from collections.abc import Sequence
from typing import Any

from bncli.cli.messages import one_line
from bncli.cli.tables.table import console_for_results, number, show_lines, table_of
from bncli.training.convergence import LayerHistory


def describe_convergence(run_dir: str, histories: Sequence[LayerHistory]) -> dict[str, Any]:
    """The JSON document."""
    return {"run_dir": run_dir, "num_layers": len(histories), "layers": histories}


def show_convergence(run_dir: str, histories: Sequence[LayerHistory]) -> None:
    """One row per layer: its first and its last epoch."""
    console = console_for_results()
    epochs = sorted({point.epoch for history in histories for point in history.epochs})
    first, last = epochs[0], epochs[-1]
    what = f"{len(histories)} BatchNorm layers, epoch {first}" + (f" to {last}" if last > first else "")
    console.print(f"{one_line(run_dir)}: {what}", style="bold")
    ends = ("first", "last") if len(epochs) > 1 else ("last",)
    headers = [f"{name}\n{end}" for name in ("mean_shift", "var_ratio") for end in ends]
    table = table_of(None, "layer", *headers)
    for history in histories:
        points = (history.epochs[0], history.epochs[-1])[-len(ends) :]
        shifts = [number(point.mean_shift) for point in points]
        ratios = [number(point.var_ratio) for point in points]
        table.add_row(one_line(history.name), *shifts, *ratios)
    console.print(table)
    console.print()
    meanings = {
        "mean_shift": "running_mean from the epoch's batches, in standard deviations",
        "var_ratio": "running_var over the batches', eps added to both; 1 is a match",
        "-": "could not be recovered: frozen, run twice in a step, momentum 0",
    }
    show_lines(console, meanings)
