"""The output of `bncli average`."""

from dataclasses import dataclass
from typing import Any

from bncli.cli.tables.table import console_for_results, print_wrapped, table_of
from bncli.training import AveragedCheckpoint
from bncli.wording import plural

MEANINGS = {
    "recalibrate": "measured on training images",
    "pooled": "of all checkpoints' distributions together",
    "average": "averaged like weights",
    "first": "of the first checkpoint",
}


@dataclass(frozen=True)
class AverageReport:
    """Everything that `bncli average` did."""

    output: str
    made: AveragedCheckpoint
    runtime: dict[str, Any] | None  # None: nothing was computed with the network

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {"output": self.output, **self.made.to_dict(), "runtime": self.runtime}


def show_average(report: AverageReport) -> None:
    """Each checkpoint with its share, the average with each kind of running statistics, and the verdict."""
    console, made = console_for_results(), report.made
    used = sum(1 for source in made.sources if source.share)
    head = (
        f"{report.output}: the average of {plural(used, 'checkpoint')}, {plural(made.num_averaged, 'tensor')}"
    )
    left_out = len(made.sources) - used
    print_wrapped(console, head + (f" ({left_out} left out)" if left_out else ""), style="bold")
    console.print()
    evaluated = bool(made.scores)
    columns = ("accuracy", "loss") if evaluated else ()
    table = table_of(None, "checkpoint", "share", *columns, left=1)
    for source in made.sources:
        share = f"{source.share:.3f}".rstrip("0").rstrip(".") if source.share else "left out"
        numbers = [] if source.score is None else [f"{source.score.accuracy:.2%}", f"{source.score.loss:.4f}"]
        table.add_row(source.path, share, *numbers)
    console.print(table)
    console.print()
    if evaluated:
        table = table_of(None, "average, with running statistics", "accuracy", "loss", left=1)
        for how, score in made.scores.items():
            mark = " (written)" if how == made.statistics else ""
            row = f"{how}{mark}: {MEANINGS[how]}"
            table.add_row(row, f"{score.accuracy:.2%}", f"{score.loss:.4f}")
        console.print(table)
        console.print()
    else:
        print_wrapped(console, f"Running statistics: {made.statistics}, {MEANINGS[made.statistics]}.")
    if made.recalibration is not None:
        images = plural(made.recalibration.num_images, "training image")
        print_wrapped(console, f"Running statistics were measured on {images} ({made.recalibration.method}).")
    if made.against_best is not None:
        print_wrapped(
            console, f"Against the best checkpoint in it: {made.against_best.verdict}", style="bold"
        )
