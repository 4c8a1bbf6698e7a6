"""The output of `bncli recalibrate`."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from bncli.cli.messages import after_epoch, one_line
from bncli.cli.tables.table import (
    console_for_results,
    number,
    print_wrapped,
    runtime_line,
    show_lines,
    table_of,
)
from bncli.training import RecalibratedNetwork, Verification
from bncli.wording import plural


@dataclass(frozen=True)
class RecalibrateReport:
    """Everything that `bncli recalibrate -o NEW` did."""

    input: str
    output: str
    epoch: int | None
    dataset: str
    made: RecalibratedNetwork
    runtime: dict[str, Any]
    verification: Verification | None  # of the new file, with --verify
    network: dict[str, object]  # the part `model` of the JSON document; empty for bncli's own

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "input": self.input,
            "output": self.output,
            **self.network,
            "dataset": self.dataset,
            **self.made.to_dict(),
            "runtime": self.runtime,
            "verification": None
            if self.verification is None
            else verification_document(self.output, self.verification),
        }


def show_recalibrate(report: RecalibrateReport) -> None:
    """Where from and where to, before and after, how far each layer moved, and the verdict."""
    console = console_for_results()
    made, done = report.made, report.made.recalibration
    measured = f"{done.method}, no images needed"
    if done.num_images:
        measured = (
            f"{done.method}, {done.num_images:,} training images of {report.dataset},"
            f" at the cost of {done.forward_passes:.2f} forward passes"
        )
    if done.stopped_early:
        measured += "; the tolerance was reached"
    lines = {
        "checkpoint": f"{report.input}{after_epoch(report.epoch)}, unchanged",
        "new": report.output,
        "method": measured,
        "test split": f"{plural(made.difference.num_images, 'image')} in eval mode",
        "runtime": runtime_line(report.runtime),
    }
    show_lines(console, lines)
    console.print()
    table = table_of(None, "", "accuracy", "loss", left=1)
    table.add_row("before", f"{made.before.accuracy:.2%}", f"{made.before.loss:.4f} nats")
    table.add_row("after", f"{made.after.accuracy:.2%}", f"{made.after.loss:.4f} nats")
    console.print(table)
    console.print()
    table = table_of(
        "How far the old statistics were off", "layer", "mean shift", "var ratio", "standard error"
    )
    for layer in done.layers:
        table.add_row(
            one_line(layer.name), number(layer.mean_shift_in_new_deviations), number(layer.var_ratio),
            number(layer.standard_error),
        )  # fmt: skip
    console.print(table)
    console.print()
    meanings = {
        "mean shift": "of running_mean, in the new deviations, RMS over channels",
        "var ratio": "old running_var over new one, geometric mean over channels",
        "standard error": "of the new mean, in its deviations, if the images are a sample",
    }
    show_lines(console, meanings)
    for one in done.skipped:
        console.print(f"left alone: {one_line(f'{one.name} {one.reason}')}")
    if report.verification is not None:
        console.print()
        _show_consistency(console, report.verification)
    _show_verdict(console, made.difference.verdict)


def verification_document(checkpoint: str, found: Verification) -> dict[str, Any]:
    """The JSON document of `--verify`."""
    return {"input": checkpoint, "checkpoint": checkpoint, **found.to_dict()}


def show_verification(checkpoint: str, found: Verification) -> None:
    """Each layer's statistics against its input, and whether they agree."""
    console = console_for_results()
    lines = {
        "checkpoint": checkpoint,
        "images": f"{found.num_images:,} training images of {found.dataset},"
        f" in eval mode in batches of {found.batch_size:,}",
    }
    show_lines(console, lines)
    console.print()
    _show_consistency(console, found)
    _show_verdict(console, found.verdict)


def _show_consistency(console: Console, found: Verification) -> None:
    table = table_of(
        "Against the input in eval mode",
        "layer", "mean shift", "var ratio", "largest error",
    )  # fmt: skip
    for layer in found.layers:
        table.add_row(
            one_line(layer.name), number(layer.mean_shift_in_input_deviations), f"{layer.var_ratio:.4g}",
            f"{layer.max_relative_error:.1e}",
        )  # fmt: skip
    console.print(table)


def _show_verdict(console: Console, text: str) -> None:
    console.print()
    print_wrapped(console, text, style="bold")
