"""The output of `bncli eval`."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from bncli.cli.messages import one_line
from bncli.cli.render import console_for_results, runtime_line, show_lines, table_of
from bncli.evaluation import Determinism, Evaluation


@dataclass(frozen=True)
class EvalReport:
    """Everything that `bncli eval` found."""

    checkpoint: str
    epoch: int
    dataset: str
    class_names: tuple[str, ...]
    evaluation: Evaluation
    determinism: Determinism
    runtime: dict[str, Any]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document: the evaluation's keys at the top, the check under `determinism`."""
        evaluation = asdict(self.evaluation)
        per_class = evaluation.pop("per_class_accuracy")
        return {
            "checkpoint": self.checkpoint,
            "epoch": self.epoch,
            "dataset": self.dataset,
            **evaluation,
            "per_class_accuracy": dict(zip(self.class_names, per_class, strict=True)),
            "determinism": asdict(self.determinism),
            "runtime": self.runtime,
            "machine": self.machine,
        }


def show_eval(report: EvalReport) -> None:
    """Accuracy, per-class accuracy, the determinism table and its verdict."""
    console = console_for_results()
    evaluation = report.evaluation
    lines = {
        "checkpoint": f"{report.checkpoint}, after epoch {report.epoch}",
        "test split": f"{report.dataset}, {evaluation.num_images:,} images in eval mode",
        "runtime": runtime_line(report.runtime),
        "accuracy": f"{evaluation.accuracy:.2%}",
        "loss": f"{evaluation.loss:.4f} nats",
        "speed": f"{evaluation.images_per_second:,.0f} images/s",
    }
    show_lines(console, lines)
    console.print()
    table = table_of("Accuracy by class", "class", "accuracy")
    for name, accuracy in zip(report.class_names, evaluation.per_class_accuracy, strict=True):
        table.add_row(one_line(name), "-" if accuracy is None else f"{accuracy:.2%}")
    console.print(table)
    _show_determinism(console, report.determinism)


def _show_determinism(console: Console, found: Determinism) -> None:
    console.print()
    table = table_of(
        f"One by one against in a batch: logits of the same {found.num_images} images",
        "mode",
        "batch size",
        "same bits",
        "largest difference",
        "predictions changed",
    )
    again = "yes" if found.repeat_bitwise_equal else "no"
    table.add_row("eval", "1, again", again, "0" if found.repeat_bitwise_equal else "", "")
    for check in found.batch_sizes:
        table.add_row(
            "eval",
            str(check.batch_size),
            "yes" if check.bitwise_equal else "no",
            f"{check.max_abs_diff:.2g}",
            str(check.prediction_flips),
        )
    contrast = found.train_mode
    if contrast is not None:
        table.add_row(
            "train",
            str(contrast.batch_size),
            "yes" if contrast.max_abs_diff == 0 else "no",
            f"{contrast.max_abs_diff:.2g}",
            str(contrast.prediction_flips),
        )
    console.print(table)
    console.print()
    unchanged = "unchanged" if found.running_stats_unchanged else "CHANGED"
    console.print(f"Every batch size in two orders. Running statistics after all of it: {unchanged}.")
    console.print(_verdict(found), style="bold")


def _verdict(found: Determinism) -> str:
    if not found.deterministic:
        flips = max(check.prediction_flips for check in found.batch_sizes)
        return (
            f"In eval mode up to {flips} predictions depend on the batch: this network is not deterministic."
        )
    in_eval = "In eval mode every image gets the prediction it gets alone"
    if found.train_mode is None:
        return f"{in_eval}."
    return (
        f"{in_eval}; in train mode {found.train_mode.prediction_flips} of {found.num_images} change"
        " with their companions."
    )
