"""Accuracy against batch size as one picture: the running statistics' reason to exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.plots.figure import GRID, NOTE, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bncli.evaluation.sweep import SweepPoint

EVAL, BATCH = "#2f6199", "#c0392b"  # as far apart for the colour-blind as for others
SIZE = (8.0, 4.6)  # inches


@dataclass(frozen=True)
class _Line:
    """One of the two lines; fractions in [0, 1]."""

    sizes: list[int]
    accuracies: list[float]
    intervals: list[tuple[float, float]]


def plot_sweep(points: Sequence[SweepPoint], path: Path, *, source: str, num_classes: int) -> None:
    """Draw accuracy in eval mode and with batch statistics against batch size, with 95 % intervals.

    `source` says below the picture what was measured. The suffix of `path` selects PNG or SVG.

    Raises BncliError for another suffix, or a path that cannot be written.
    """
    plain = _Line(
        [point.batch_size for point in points],
        [point.eval_accuracy for point in points],
        [point.eval_interval for point in points],
    )
    known = [
        (point.batch_size, point.batch_statistics_accuracy, point.batch_statistics_interval)
        for point in points
        if point.batch_statistics_accuracy is not None and point.batch_statistics_interval is not None
    ]
    measured = _Line([x for x, _, _ in known], [y for _, y, _ in known], [z for _, _, z in known])

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained", rect=(0.0, 0.055, 1.0, 0.945))
        axis = figure.subplots()
        _set_axes(axis, plain.sizes, num_classes)
        _draw_line(axis, measured, BATCH)
        _draw_line(axis, plain, EVAL)
        _label_lines(axis, plain, measured)
        axis.set_title(
            "One network, one test set: accuracy by where BatchNorm takes its statistics from",
            fontsize=11, fontweight="bold", loc="left", pad=12,
        )  # fmt: skip
        figure.text(0.012, 0.02, source, color=NOTE, fontsize=7.5)

    save_figure(path, SIZE, draw)


def _set_axes(axis: Axes, sizes: list[int], num_classes: int) -> None:
    from matplotlib.ticker import NullLocator, PercentFormatter

    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    margin = 1.18  # a factor: half the distance of neighbours, or less, on this axis
    axis.set_xlim(sizes[0] / margin, sizes[-1] * margin)
    axis.set_ylim(0, 1.08)  # room for the name of a line at 100 %
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel("images in the batch (log scale)", color=NOTE)
    axis.set_ylabel("test accuracy", color=NOTE)
    axis.grid(color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.axhline(1 / num_classes, color=NOTE, linewidth=0.9, linestyle=(0, (4, 3)))
    axis.annotate(
        f"guessing: 1 of {num_classes}", (1.0, 1 / num_classes), xycoords=("axes fraction", "data"),
        xytext=(-4, 4), textcoords="offset points", ha="right", color=NOTE, fontsize=8,
    )  # fmt: skip


def _draw_line(axis: Axes, line: _Line, colour: str) -> None:
    low, high = [pair[0] for pair in line.intervals], [pair[1] for pair in line.intervals]
    axis.fill_between(line.sizes, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.vlines(line.sizes, low, high, color=colour, linewidth=1.1)
    axis.plot(line.sizes, line.accuracies, "o-", color=colour, linewidth=2.0, ms=5.5, mec="white", mew=0.9)


def _label_lines(axis: Axes, plain: _Line, measured: _Line) -> None:
    """Names and numbers stand at the lines; a legend would have to be decoded."""
    low, high = min(plain.accuracies), max(plain.accuracies)
    flat = f"{low:.1%}" if f"{low:.1%}" == f"{high:.1%}" else f"{low:.1%} to {high:.1%}"
    axis.annotate(
        f"eval mode, running statistics: {flat} in batches of any size", (plain.sizes[0], high),
        xytext=(-3, 8), textcoords="offset points", va="bottom", color=EVAL, fontweight="bold",
    )  # fmt: skip
    apart = [
        (size, accuracy)
        for size, accuracy in zip(measured.sizes, measured.accuracies, strict=True)
        if accuracy < low - 0.04  # closer to the other line there is no room for a number
    ]
    for size, accuracy in apart:
        axis.annotate(
            f"{accuracy:.1%}", (size, accuracy), xytext=(8, -4), textcoords="offset points",
            va="top", color=BATCH, fontsize=8,
        )  # fmt: skip
    if measured.sizes:
        anchor = apart[len(apart) // 2] if apart else (measured.sizes[0], measured.accuracies[0])
        axis.annotate(
            "batch statistics, as in train mode:\nmean and variance of the batch itself", anchor,
            xytext=(26, -24), textcoords="offset points", va="top", color=BATCH, fontweight="bold",
        )  # fmt: skip
    if missing := [size for size in plain.sizes if size not in measured.sizes]:
        axis.annotate(
            f"batch of {', '.join(map(str, missing))}: refused, one value per channel has no variance",
            (missing[0], 0.015), xytext=(0, 0), textcoords="offset points", color=BATCH, fontsize=8,
        )  # fmt: skip
