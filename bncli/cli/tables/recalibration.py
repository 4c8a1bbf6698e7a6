"""The output of `bncli recalibrate`."""

import textwrap
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any

from rich.console import Console

from bncli.batchnorm import LayerConsistency
from bncli.cli.messages import one_line
from bncli.cli.tables.table import console_for_results, number, runtime_line, show_lines, table_of
from bncli.evaluation import PairedDifference
from bncli.training import RecalibratedCheckpoint


@dataclass(frozen=True)
class Verification:
    """Running statistics against the training images that enter each layer in eval mode."""

    checkpoint: str
    dataset: str
    num_images: int
    batch_size: int
    max_error: float  # relative, in any channel, up to which a layer counts as self-consistent
    layers: tuple[LayerConsistency, ...]

    @property
    def self_consistent(self) -> bool:
        """Whether no channel of any layer is further off; a value that is no number is."""
        return all(layer.max_relative_error <= self.max_error for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document of `--verify`."""
        return {"input": self.checkpoint, "self_consistent": self.self_consistent, **asdict(self)}


@dataclass(frozen=True)
class RecalibrateReport:
    """Everything that `bncli recalibrate -o NEW` did."""

    input: str
    output: str
    dataset: str
    made: RecalibratedCheckpoint
    runtime: dict[str, Any]
    verification: Verification | None  # of the new file, with --verify

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "input": self.input,
            "output": self.output,
            "dataset": self.dataset,
            "before": asdict(self.made.before),
            "after": asdict(self.made.after),
            "difference": asdict(self.made.difference),
            "verdict": verdict(self.made.difference),
            **asdict(self.made.recalibration),
            "runtime": self.runtime,
            "verification": None if self.verification is None else self.verification.to_dict(),
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
        "checkpoint": f"{report.input}, after epoch {made.checkpoint.epoch}, unchanged",
        "new": report.output,
        "method": measured,
        "test split": f"{made.difference.num_images:,} images in eval mode",
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
    _show_verdict(console, verdict(made.difference))


def show_verification(found: Verification) -> None:
    """Each layer's statistics against its input, and whether they agree."""
    console = console_for_results()
    lines = {
        "checkpoint": found.checkpoint,
        "images": f"{found.num_images:,} training images of {found.dataset},"
        f" in eval mode in batches of {found.batch_size:,}",
    }
    show_lines(console, lines)
    console.print()
    _show_consistency(console, found)
    worst = max(found.layers, key=lambda layer: _rank(layer.max_relative_error))
    error = f"{worst.max_relative_error:.1e} in {one_line(worst.name)}"
    _show_verdict(
        console,
        f"Self-consistent: no statistic is further off than {error}."
        if found.self_consistent
        else f"Not self-consistent: off by {error}, more than the {found.max_error:g} allowed.",
    )


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
    console.print(textwrap.fill(text, 80, break_on_hyphens=False), style="bold")


def verdict(difference: PairedDifference) -> str:
    """One sentence: was it worth it? Only what McNemar's test tells from chance counts."""
    points, error = 100 * difference.accuracy, 100 * difference.accuracy_standard_error
    numbers = (
        f"{points:+.2f} points of accuracy (standard error {error:.2f}, {difference.num_gained:,} images"
        f" gained, {difference.num_lost:,} lost), {difference.loss:+.4f} nats of loss (standard error"
        f" {difference.loss_standard_error:.4f})"
    )
    if difference.is_gain:
        return f"A gain: {numbers}."
    if difference.is_loss:
        return f"Worse, keep the old checkpoint: {numbers}."
    return f"No gain beyond chance: {numbers}."


def _rank(error: float) -> float:
    return float("inf") if isnan(error) else error
