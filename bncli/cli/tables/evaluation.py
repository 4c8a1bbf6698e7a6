"""The output of `bncli eval`."""

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from bncli.cli.messages import one_line
from bncli.cli.tables.gap import describe_gap, gap_verdict, show_gap
from bncli.cli.tables.table import console_for_results, number, runtime_line, show_lines, table_of
from bncli.determinism import Certificate
from bncli.evaluation import AugmentedEvaluation, Evaluation, Gap, SweepPoint

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
    """Everything that `bncli eval` found."""

    checkpoint: str
    epoch: int
    dataset: str
    class_names: tuple[str, ...]
    evaluation: Evaluation
    determinism: Certificate
    fixed_rows: int | None  # of --batch-invariant; None without it
    sweep: tuple[SweepPoint, ...]  # empty without --sweep
    gap: Gap | None  # None without --gap
    tta: AugmentedEvaluation | None  # None without --tta
    runtime: dict[str, Any]
    machine: dict[str, Any]

    @property
    def batch_invariant(self) -> bool:
        """Whether a fixed-shape forward was used."""
        return self.fixed_rows is not None

    @property
    def passed(self) -> bool:
        """No prediction depends on the batch, and with a fixed-shape forward not one bit."""
        return self.determinism.deterministic and (self.determinism.bitwise_equal or not self.batch_invariant)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document: the evaluation's keys at the top, the certificate under `determinism`."""
        evaluation = asdict(self.evaluation)
        per_class = evaluation.pop("per_class_accuracy")
        return {
            "checkpoint": self.checkpoint,
            "epoch": self.epoch,
            "dataset": self.dataset,
            **evaluation,
            "per_class_accuracy": dict(zip(self.class_names, per_class, strict=True)),
            **self._findings(),
            "sweep": [asdict(point) for point in self.sweep],
            "gap": None if self.gap is None else describe_gap(self.gap),
            "tta": None if self.tta is None else asdict(self.tta),
        }

    def certificate_dict(self, checkpoint_sha256: str) -> dict[str, Any]:
        """The certificate as a document of its own, with all that it was obtained on."""
        return {
            "checkpoint": self.checkpoint,
            "checkpoint_sha256": checkpoint_sha256,
            "epoch": self.epoch,
            "dataset": self.dataset,
            **self._findings(),
        }

    def _findings(self) -> dict[str, Any]:
        return {
            "batch_invariant": self.batch_invariant,
            "fixed_rows": self.fixed_rows,
            "determinism": asdict(self.determinism),
            "runtime": self.runtime,
            "machine": self.machine,
        }


def show_eval(report: EvalReport) -> None:
    """Accuracy, per-class accuracy, the certificate, the sweep, and the verdict."""
    console = console_for_results()
    evaluation = report.evaluation
    lines = {
        "checkpoint": f"{report.checkpoint}, after epoch {report.epoch}",
        "test split": f"{report.dataset}, {evaluation.num_images:,} images in eval mode",
        "runtime": runtime_line(report.runtime),
        "machine": "{cpu}, {cpu_capability}, torch {torch}".format(**report.machine),
        "accuracy": f"{evaluation.accuracy:.2%}",
        "loss": f"{evaluation.loss:.4f} nats",
        "speed": f"{evaluation.images_per_second:,.0f} images/s",
    }
    if report.tta is not None:
        lines["with views"] = (
            f"{report.tta.accuracy:.2%}, loss {report.tta.loss:.4f}: --tta {report.tta.views},"
            f" {report.tta.num_views} views, {report.tta.seconds:.1f} s"
        )
    if report.batch_invariant:
        lines["fixed shape"] = f"chunks of {report.fixed_rows} rows, padded where images are fewer"
    show_lines(console, lines)
    console.print()
    table = table_of("Accuracy by class", "class", "accuracy")
    for name, accuracy in zip(report.class_names, evaluation.per_class_accuracy, strict=True):
        table.add_row(one_line(name), "-" if accuracy is None else f"{accuracy:.2%}")
    console.print(table)
    _show_claims(console, report.determinism)
    _show_batch_sizes(console, report.determinism)
    if report.sweep:
        _show_sweep(console, report.sweep)
    if report.gap is not None:
        show_gap(console, report.gap)
    console.print()
    console.print(textwrap.fill(_verdict(report), 80, break_on_hyphens=False), style="bold")
    if report.gap is not None:
        console.print()
        console.print(textwrap.fill(gap_verdict(report.gap), 80, break_on_hyphens=False), style="bold")


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


def _verdict(report: EvalReport) -> str:
    found = report.determinism
    failed = {
        name.replace("_", " "): claim
        for name in CLAIMS
        if not (claim := getattr(found.claims, name)).bitwise_equal
    }
    where = ", ".join(f"{name} (first in {claim.first_differing_layer})" for name, claim in failed.items())
    if not found.deterministic:
        flips = max(claim.prediction_flips for claim in found.claims)
        return (
            f"In eval mode up to {flips} predictions depend on the batch: this network is not deterministic;"
            f" its logits depend on {one_line(where)}."
        )
    in_train = f"in train mode {found.train_mode.prediction_flips} of {found.num_images} change with their"
    in_eval = "In eval mode every image gets the prediction it gets alone"
    if not failed:
        return f"{in_eval}, to the last bit of its logits; {in_train} companions."
    if report.batch_invariant:
        return f"--batch-invariant does not hold on this machine: the last bits depend on {one_line(where)}."
    return (
        f"{in_eval}, though the last bits of its logits depend on {one_line(where)},"
        f" which --batch-invariant prevents; {in_train} companions."
    )
