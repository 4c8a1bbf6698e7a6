"""The output of `bncli recalibrate`."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from bncli.batchnorm.population.selection import by_reason
from bncli.cli.messages import after_epoch
from bncli.cli.tables.layer_table import show_layer_table
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
    dataset: str | None  # None: none was needed
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
        images = plural(done.num_images, "training image")
        measured = f"{done.method}, {images} of {report.dataset} ({done.forward_passes:.2f} forward passes)"
    if done.stopped_early:
        measured += "; stopped as the tolerance was reached"
    lines = {
        "checkpoint": f"{report.input}{after_epoch(report.epoch)}, unchanged",
        "new": report.output,
        "method": measured,
        "test split": "not evaluated"
        if made.scores is None
        else f"{plural(made.scores.difference.num_images, 'image')} in eval mode",
        "runtime": runtime_line(report.runtime),
    }
    show_lines(console, lines)
    console.print()
    if made.scores is not None:
        table = table_of(None, "", "accuracy", "loss", left=1)
        for when, score in (("before", made.scores.before), ("after", made.scores.after)):
            table.add_row(when, f"{score.accuracy:.2%}", f"{score.loss:.4f}")
        console.print(table)
        console.print()
    console.print("How far the old statistics were off", style="bold")
    columns = {
        "mean shift": [number(layer.mean_shift_in_new_deviations) for layer in done.layers],
        "variance ratio": [number(layer.var_ratio) for layer in done.layers],
        "standard error": [number(layer.standard_error) for layer in done.layers],
    }
    if not any(layer.standard_error for layer in done.layers):  # without data there is none
        del columns["standard error"]
    show_layer_table(console, [layer.name for layer in done.layers], columns)
    console.print()
    meanings = {
        "mean shift": "old running_mean minus new one, in standard deviations",
        "variance ratio": "old running_var divided by new one; 1 is equal",
        "standard error": "uncertainty of the new mean from these images, in standard deviations",
    }
    show_lines(console, {name: text for name, text in meanings.items() if name in columns})
    for sentence in by_reason(done.skipped):
        print_wrapped(console, f"left unchanged: {sentence}")
    if report.verification is not None:
        console.print()
        _show_consistency(console, report.verification)
    if report.verification is not None and made.scores is None:
        _show_verdict(console, report.verification.verdict)
    _show_verdict(console, made.verdict)


def verification_document(checkpoint: str, found: Verification) -> dict[str, Any]:
    """The JSON document of `--verify`."""
    return {"input": checkpoint, "checkpoint": checkpoint, **found.to_dict()}


def show_verification(checkpoint: str, found: Verification) -> None:
    """Each layer's statistics against its input, and whether they agree."""
    console = console_for_results()
    lines = {
        "checkpoint": checkpoint,
        "images": f"{plural(found.num_images, 'training image')} of {found.dataset},"
        f" in eval mode, in batches of {found.batch_size:,}",
    }
    show_lines(console, lines)
    console.print()
    _show_consistency(console, found)
    _show_verdict(console, found.verdict)


def _show_consistency(console: Console, found: Verification) -> None:
    console.print("Running statistics against the layer's real input in eval mode", style="bold")
    columns = {
        "mean shift": [number(layer.mean_shift_in_input_deviations) for layer in found.layers],
        "variance ratio": [f"{layer.var_ratio:.4g}" for layer in found.layers],
        "largest error": [number(layer.max_relative_error) for layer in found.layers],
    }
    show_layer_table(console, [layer.name for layer in found.layers], columns)
    console.print()
    meanings = {
        "mean shift": "running_mean minus the input's mean, in standard deviations",
        "variance ratio": "running_var divided by the input's variance; 1 is equal",
        "largest error": f"relative, of any mean or variance; at most {found.max_error:g} is allowed",
    }
    show_lines(console, meanings)


def _show_verdict(console: Console, text: str) -> None:
    console.print()
    print_wrapped(console, text, style="bold")
