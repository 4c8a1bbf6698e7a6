"""The output of `bncli demo`."""

from typing import Any

from bncli.cli.messages import one_line
from bncli.cli.tables.table import (
    console_for_results,
    machine_line,
    print_wrapped,
    runtime_line,
    show_lines,
    table_of,
)
from bncli.demo import Demonstration
from bncli.evaluation import Gap


def describe_demonstration(result: Demonstration) -> dict[str, Any]:
    """The JSON document."""
    return {
        "checkpoint": result.checkpoint,
        "dataset": result.dataset,
        "num_test_images": result.num_test_images,
        "num_calibration_images": result.num_calibration_images,
        "intact": result.intact.to_dict(),
        "ruins": [
            {
                "name": ruin.name,
                "what": ruin.what,
                "ruined_layer": ruin.ruined_layer,
                "saved": ruin.saved,
                "gap": ruin.gap.to_dict(),
            }
            for ruin in result.ruins
        ],
        "runtime": result.runtime,
        "machine": result.machine,
    }


def show_demonstration(result: Demonstration) -> None:
    """Accuracy before and after, and what --gap says, for each accident."""
    console = console_for_results()
    lines = {
        "machine": machine_line(result.machine),
        "runtime": runtime_line(result.runtime),
        "checkpoint": result.checkpoint or "trained for this, and not kept (--save-dir keeps it)",
        "data": f"{result.dataset}, {result.num_test_images:,} test images;"
        f" repaired with {result.num_calibration_images:,} training images",
    }
    show_lines(console, lines)
    console.print()
    table = table_of("Test accuracy in eval mode", "accident", "ruined", "precise", "exact", "loss")
    _add_row(table, "none", result.intact)
    for ruin in result.ruins:
        _add_row(table, ruin.name, ruin.gap)
    console.print(table)
    console.print()
    show_lines(
        console,
        {
            "precise, exact": "after recalibration by that method",
            "loss": "of the ruined network, and after exact recalibration",
        },
    )
    _show_finding("none: the network as it is", result.intact)
    for ruin in result.ruins:
        layer = "" if ruin.ruined_layer is None else f", of {one_line(ruin.ruined_layer)}"
        _show_finding(f"{ruin.name}: {ruin.what}{layer}", ruin.gap)


def _add_row(table: Any, name: str, gap: Gap) -> None:
    table.add_row(
        name, f"{gap.running.accuracy:.2%}", f"{gap.precise.accuracy:.2%}", f"{gap.exact.accuracy:.2%}",
        f"{gap.running.loss:.3f} to {gap.exact.loss:.3f}",
    )  # fmt: skip


def _show_finding(title: str, gap: Gap) -> None:
    console = console_for_results()
    console.print()
    console.print(title, style="bold")
    print_wrapped(console, gap.verdict, indent=4)
