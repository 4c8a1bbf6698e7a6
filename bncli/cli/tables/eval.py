"""The output of `bncli eval`, and of its `--gap`."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from bncli.cli.messages import after_epoch, one_line
from bncli.cli.tables.layer_table import show_layer_table
from bncli.cli.tables.table import (
    console_for_results,
    number,
    print_wrapped,
    runtime_line,
    show_lines,
    table_of,
)
from bncli.determinism import Apart, Certificate
from bncli.evaluation import Examination, Gap, LayerGap, SweepPoint
from bncli.evaluation.gap import SOURCES
from bncli.wording import plural

CLAIMS = {
    "repeat": "the same batch, computed twice",
    "neighbours": "other images in the batch, each image at the same place",
    "position": "the same images in the batch, each at another place",
    "batch_size": "alone, and in batches of the sizes below",
}
MEASURES = {
    "absolute": "the largest difference between two logits",
    "relative": "the same, divided by the largest logit of the image",
    "ulp": "the same, in units in the last place",
    "changed": "images whose prediction changes",
    "first layer": "whose output differs",
}


@dataclass(frozen=True)
class EvalReport:
    """What `bncli eval` found, and what it was found on."""

    checkpoint: str
    epoch: int | None
    network: dict[str, object]  # the part `model` of the JSON document; empty for bncli's own
    dataset: str
    class_names: tuple[str, ...]
    found: Examination
    runtime: dict[str, Any]
    machine: dict[str, Any]
    folding: str | None = None  # where an engine computes, in eval mode alone: what became of BatchNorm

    def to_dict(self) -> dict[str, Any]:
        """The JSON document; of an engine without what train mode would do."""
        found = self.found.to_dict(self.class_names)
        if self.folding is not None:
            found["determinism"]["train_mode"] = None
            for point in found["sample_sweep"]:
                point["batch_statistics_accuracy"] = point["batch_statistics_interval"] = None
        return {
            "checkpoint": self.checkpoint,
            "epoch": self.epoch,
            **self.network,
            "dataset": self.dataset,
            **found,
            "runtime": self.runtime,
            "machine": self.machine,
        }

    def certificate_dict(self, checkpoint_sha256: str) -> dict[str, Any]:
        """The certificate as a document of its own, with all that it was obtained on."""
        document = self.to_dict()
        document["runtime"] = {k: v for k, v in self.runtime.items() if k != "processes"}  # rank 0 alone
        parts = ("batch_invariant", "fixed_rows", "determinism", "runtime", "machine")
        return {
            "checkpoint": self.checkpoint,
            "checkpoint_sha256": checkpoint_sha256,
            "epoch": self.epoch,
            **self.network,
            "dataset": self.dataset,
            "images": self.found.sample,
            **{name: document[name] for name in parts},
        }


def show_eval(report: EvalReport, *, details: bool) -> None:
    """The answer in a few lines, then what was asked for beside it."""
    console = console_for_results()
    found = report.found
    _show_answer(console, report)
    if details:
        _show_details(console, report)
    if found.sweep:
        _show_sweep(console, found.sweep)
    if found.gap is not None:
        show_gap(console, found.gap)
        console.print()
        print_wrapped(console, found.gap.verdict, style="bold")


def _show_answer(console: Console, report: EvalReport) -> None:
    """Accuracy, and what becomes of predictions in other batches: at most 15 lines."""
    found, certificate = report.found, report.found.certificate
    evaluation = found.evaluation
    num_test = plural(evaluation.num_images, "test image")
    console.print(
        f"accuracy {evaluation.accuracy:.2%} of {num_test} in eval mode (loss {evaluation.loss:.4f})"
    )
    if found.is_confident_at_chance:
        print_wrapped(console, _chance_notice(report), style="bold")
    if (tta := found.tta) is not None:
        console.print(
            f"accuracy {tta.accuracy:.2%} averaged over {tta.num_views} views of each image"
            f" (--tta {tta.views}, loss {tta.loss:.4f})"
        )
    rows = certificate.fixed_rows
    chunks = "" if rows is None else f" (in chunks of {plural(rows, 'row')})"
    sizes = [check.batch_size for check in certificate.batch_sizes if check.batch_size > 1]
    several = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    images = plural(certificate.num_images, "image")
    each = "each alone" if certificate.num_images > 1 else "alone"
    console.print(f"{images}, {each} and in batches of {several}{chunks}:")
    columns = " / ".join(str(point.batch_size) for point in found.sample_sweep)
    table = table_of(
        None, "", "predictions\nchanged", "largest logit\ndifference", f"accuracy in batches\nof {columns}"
    )
    rounding = " (rounding)" if certificate.within_rounding else ""
    table.add_row(
        "eval mode",
        *_apart(certificate.eval_mode, certificate, rounding),
        _accuracies([point.eval_accuracy for point in found.sample_sweep]),
    )
    if report.folding is None:
        table.add_row(
            "train mode",
            *_apart(certificate.train_mode.any_batch_size, certificate),
            _accuracies([point.batch_statistics_accuracy for point in found.sample_sweep]),
        )
    console.print(table)
    console.print()
    if report.folding is None:
        notes = _notes(certificate)
    else:
        notes = [f"Computed by {report.runtime['engine']}, in eval mode alone: {report.folding}."]
    for note in notes:
        print_wrapped(console, note)
    print_wrapped(console, certificate.verdict, style="bold")
    if not certificate.deterministic and certificate.num_batch_norm_layers:
        command = f"bncli inspect-stats {one_line(report.checkpoint)}"
        console.print(f"What is wrong with its BatchNorm layers: {command}")


def _chance_notice(report: EvalReport) -> str:
    """Likely reasons, the likeliest first; a checkpoint of `bncli train` records classes and pixels."""
    likely = "Likely: its running statistics are wrong (bncli inspect-stats, bncli eval --gap)"
    if report.network:
        likely = (
            "Likely causes, in order: its classes are in another order than those of the images"
            " (data.classes); pixels are normalised otherwise than in training (--normalization); its"
            " running statistics are wrong (bncli inspect-stats, bncli eval --gap)"
        )
    return (
        f"That is chance ({report.found.chance:.2%}), yet the network is sure of its answers"
        f" (mean top probability {report.found.evaluation.confidence:.0%}). {likely}."
    )


def _notes(certificate: Certificate) -> list[str]:
    """What one must know beside the table, where it is not as usual."""
    notes = []
    if certificate.num_batch_norm_layers == 0:
        notes.append("The network has no BatchNorm layer.")
    if (size := certificate.train_mode.reference_batch_size) > 1:
        notes.append(
            "In train mode BatchNorm refuses an image alone: a single value per channel has no variance."
            f" There the batches are compared with batches of {size}."
        )
    if not certificate.running_stats_unchanged:
        notes.append("The running statistics CHANGED meanwhile, which they must not in eval mode.")
    return notes


def _apart(found: Apart, certificate: Certificate, rounding: str = "") -> tuple[str, str]:
    """The cells for changed predictions, and for the largest difference."""
    changed = f"{found.prediction_flips:,} of {certificate.num_images:,}"
    return changed, "none" if found.max_abs_diff == 0 else number(found.max_abs_diff) + rounding


def _accuracies(accuracies: list[float | None]) -> str:
    texts = ["-" if accuracy is None else f"{100 * accuracy:.1f}" for accuracy in accuracies]
    return " / ".join(texts) + "%"


def _show_details(console: Console, report: EvalReport) -> None:
    """What it was found on, the classes, the four claims and the batch sizes."""
    found = report.found
    console.print()
    lines = {
        "checkpoint": report.checkpoint + after_epoch(report.epoch),
        "data": report.dataset,
        "runtime": runtime_line(report.runtime)
        + (f", {report.runtime['engine']}" if report.folding is not None else ""),
        "machine": "{cpu}, {cpu_capability}, torch {torch}".format(**report.machine),
        "speed": f"{found.evaluation.images_per_second:,.0f} images/s",
    }
    if found.certificate.fixed_rows is not None:
        lines["fixed shape"] = (
            f"chunks of {found.certificate.fixed_rows} rows, filled up where images are fewer"
        )
    show_lines(console, lines)
    console.print()
    table = table_of("Accuracy by class", "class", "accuracy")
    for name, accuracy in zip(report.class_names, found.evaluation.per_class_accuracy, strict=True):
        table.add_row(one_line(name), "-" if accuracy is None else f"{accuracy:.2%}")
    console.print(table)
    _show_claims(console, found.certificate)
    _show_batch_sizes(console, found.certificate, has_train_mode=report.folding is None)


def _show_claims(console: Console, found: Certificate) -> None:
    console.print()
    title = f"Logits of the same {plural(found.num_images, 'image')} in eval mode"
    table = table_of(title, "", "same bits", *MEASURES)
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


def _show_batch_sizes(console: Console, found: Certificate, *, has_train_mode: bool) -> None:
    console.print()
    title = "Each image alone, compared with the same image in batches"
    table = table_of(title, "mode", "batch size", "same bits", "absolute", "ulp", "changed")
    for check in found.batch_sizes:
        table.add_row(
            "eval",
            str(check.batch_size),
            "yes" if check.bitwise_equal else "no",
            number(check.max_abs_diff),
            _count(check.max_ulp),
            str(check.prediction_flips),
        )
    if has_train_mode:
        _add_contrast(table, found)
    console.print(table)
    console.print()
    unchanged = "unchanged" if found.running_stats_unchanged else "CHANGED"
    console.print(f"Running statistics afterwards: {unchanged}. SHA-256 of single images' logits:")
    console.print(found.logits_sha256)


def _add_contrast(table: Any, found: Certificate) -> None:
    contrast = found.train_mode
    table.add_row(
        "train",
        str(contrast.batch_size),
        "yes" if contrast.max_abs_diff == 0 else "no",
        number(contrast.max_abs_diff),
        "",
        str(contrast.prediction_flips),
    )
    if len(found.batch_sizes) > 1:
        anyway = contrast.any_batch_size
        table.add_row("train", "any", "", number(anyway.max_abs_diff), "", str(anyway.prediction_flips))


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
        table.add_row(SOURCES[name], f"{score.accuracy:.2%}", f"{score.loss:.4f}")
    console.print(table)
    console.print()
    title = f"Running statistics against {gap.num_calibration_images:,} training images"
    console.print(title, style="bold")
    columns = {
        "self-consistency": [number(layer.self_consistency) for layer in gap.layers],
        "mean shift": [number(layer.mean_shift_in_input_deviations) for layer in gap.layers],
        "var ratio": [number(layer.var_ratio) for layer in gap.layers],
        "gain if repaired": [_points(layer) for layer in gap.layers],
    }
    show_layer_table(console, [layer.name for layer in gap.layers], columns)
    console.print()
    meanings = {
        "self-consistency": "how far running statistics are from the layer's input; 0 is best",
        "mean shift": "of running_mean, in deviations of the input",
        "var ratio": "running_var over the input's variance",
        "gain if repaired": f"of this layer alone, on {gap.num_trial_images:,} test images"
        if gap.num_trial_images
        else "not tried: no accuracy to recover"
        if gap.loss_is_to_blame
        else "not tried: there is nothing to recover",
    }
    show_lines(console, meanings)


def _points(layer: LayerGap) -> str:
    return "" if layer.recovered is None else f"{100 * layer.recovered:+.1f} points"
