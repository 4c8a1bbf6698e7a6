"""The output of `bncli eval`, and of its `--gap`."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from bncli.cli.messages import one_line
from bncli.cli.tables.table import (
    console_for_results,
    number,
    print_wrapped,
    runtime_line,
    show_lines,
    table_of,
)
from bncli.determinism import Certificate
from bncli.evaluation import Examination, Gap, LayerGap, SweepPoint
from bncli.evaluation.gap import SOURCES
from bncli.wording import plural

CLAIMS = {
    "repeat": "the same batch, computed twice",
    "neighbours": "the same place in a batch of the same size, other companions",
    "position": "the same companions, another place",
    "batch_size": "alone, and in batches of every size below",
}
MEASURES = {
    "absolute": "the largest difference between two logits",
    "relative": "the largest, over the largest logit of the same image",
    "ulp": "the largest, in units in the last place",
    "flips": "images whose prediction changes",
}
COLUMNS = ("same bits", "absolute", "ulp", "flips")


@dataclass(frozen=True)
class EvalReport:
    """What `bncli eval` found, and what it was found on."""

    checkpoint: str
    epoch: int
    dataset: str
    class_names: tuple[str, ...]
    found: Examination
    runtime: dict[str, Any]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "checkpoint": self.checkpoint,
            "epoch": self.epoch,
            "dataset": self.dataset,
            **self.found.to_dict(self.class_names),
            "runtime": self.runtime,
            "machine": self.machine,
        }

    def certificate_dict(self, checkpoint_sha256: str) -> dict[str, Any]:
        """The certificate as a document of its own, with all that it was obtained on."""
        document = self.to_dict()
        parts = ("batch_invariant", "fixed_rows", "determinism", "runtime", "machine")
        return {
            "checkpoint": self.checkpoint,
            "checkpoint_sha256": checkpoint_sha256,
            "epoch": self.epoch,
            "dataset": self.dataset,
            **{name: document[name] for name in parts},
        }


def show_eval(report: EvalReport) -> None:
    """Accuracy, per-class accuracy, the certificate, the sweep, and the verdict."""
    console = console_for_results()
    found = report.found
    evaluation = found.evaluation
    lines = {
        "checkpoint": f"{report.checkpoint}, after epoch {report.epoch}",
        "test split": f"{report.dataset}, {plural(evaluation.num_images, 'image')} in eval mode",
        "runtime": runtime_line(report.runtime),
        "machine": "{cpu}, {cpu_capability}, torch {torch}".format(**report.machine),
        "accuracy": f"{evaluation.accuracy:.2%}",
        "loss": f"{evaluation.loss:.4f} nats",
        "speed": f"{evaluation.images_per_second:,.0f} images/s",
    }
    if found.tta is not None:
        lines["with views"] = (
            f"{found.tta.accuracy:.2%}, loss {found.tta.loss:.4f}: --tta {found.tta.views},"
            f" {found.tta.num_views} views, {found.tta.seconds:.1f} s"
        )
    if found.certificate.fixed_rows is not None:
        lines["fixed shape"] = f"chunks of {found.certificate.fixed_rows} rows, padded where images are fewer"
    show_lines(console, lines)
    console.print()
    table = table_of("Accuracy by class", "class", "accuracy")
    for name, accuracy in zip(report.class_names, evaluation.per_class_accuracy, strict=True):
        table.add_row(one_line(name), "-" if accuracy is None else f"{accuracy:.2%}")
    console.print(table)
    _show_claims(console, found.certificate)
    _show_batch_sizes(console, found.certificate)
    if found.sweep:
        _show_sweep(console, found.sweep)
    if found.gap is not None:
        show_gap(console, found.gap)
    console.print()
    print_wrapped(console, found.certificate.verdict, style="bold")
    if found.gap is not None:
        console.print()
        print_wrapped(console, found.gap.verdict, style="bold")


def _show_claims(console: Console, found: Certificate) -> None:
    console.print()
    title = f"Logits of the same {found.num_images} images in eval mode"
    table = table_of(title, "claim", "same bits", "absolute", "relative", "ulp", "flips", "first in")
    for name in CLAIMS:
        claim = getattr(found.claims, name)
        table.add_row(
            name.replace("_", " "),
            "yes" if claim.bitwise_equal else "no",
            number(claim.max_abs_diff),
            number(claim.max_rel_diff),
            _count(claim.max_ulp),
            str(claim.prediction_flips),
            one_line(claim.first_differing_layer or ""),
        )
    table.columns[-1].justify = "left"
    console.print(table)
    console.print()
    meanings = {**CLAIMS, **MEASURES}
    show_lines(console, {name.replace("_", " "): meaning for name, meaning in meanings.items()})


def _show_batch_sizes(console: Console, found: Certificate) -> None:
    console.print()
    table = table_of("Alone against in a batch, in two orders", "mode", "batch size", *COLUMNS)
    for check in found.batch_sizes:
        table.add_row(
            "eval",
            str(check.batch_size),
            "yes" if check.bitwise_equal else "no",
            number(check.max_abs_diff),
            _count(check.max_ulp),
            str(check.prediction_flips),
        )
    contrast = found.train_mode
    table.add_row(
        "train",
        str(contrast.batch_size),
        "yes" if contrast.max_abs_diff == 0 else "no",
        number(contrast.max_abs_diff),
        "",
        str(contrast.prediction_flips),
    )
    console.print(table)
    console.print()
    unchanged = "unchanged" if found.running_stats_unchanged else "CHANGED"
    console.print(f"Running statistics after all of it: {unchanged}. SHA-256 of the logits:")
    console.print(found.logits_sha256)


def _show_sweep(console: Console, points: tuple[SweepPoint, ...]) -> None:
    console.print()
    title = "Accuracy against batch size, with 95 % intervals"
    table = table_of(title, "batch size", "eval mode", "", "batch statistics", "", left=0)
    for point in points:
        table.add_row(
            str(point.batch_size),
            f"{point.eval_accuracy:.2%}",
            _interval(point.eval_interval),
            "refused"
            if point.batch_statistics_accuracy is None
            else f"{point.batch_statistics_accuracy:.2%}",
            _interval(point.batch_statistics_interval),
        )
    console.print(table)


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}" if value < 10**6 else f"{value:.1e}"


def show_gap(console: Console, gap: Gap) -> None:
    """The four accuracies, and each layer's part."""
    console.print()
    table = table_of(f"The same {gap.num_images:,} test images", "BatchNorm uses", "accuracy", "loss")
    for name, score in gap.scores().items():
        table.add_row(SOURCES[name], f"{score.accuracy:.2%}", f"{score.loss:.4f} nats")
    console.print(table)
    console.print()
    title = f"Running statistics against {gap.num_calibration_images:,} training images"
    table = table_of(title, "layer", "self-consistency", "mean shift", "var ratio", "repair recovers")
    for layer in gap.layers:
        table.add_row(
            one_line(layer.name), number(layer.self_consistency),
            number(layer.mean_shift_in_input_deviations), number(layer.var_ratio), _points(layer),
        )  # fmt: skip
    console.print(table)
    console.print()
    meanings = {
        "self-consistency": "distance of both from the input in eval mode; 0 is best",
        "mean shift": "of running_mean, in deviations of the input",
        "var ratio": "running_var over the input's variance",
        "repair recovers": f"if only this layer is repaired, on {gap.num_trial_images:,} test images"
        if gap.num_trial_images
        else "not tried: there is nothing to recover",
    }
    show_lines(console, meanings)


def _points(layer: LayerGap) -> str:
    return "" if layer.recovered is None else f"{100 * layer.recovered:+.1f} points"
