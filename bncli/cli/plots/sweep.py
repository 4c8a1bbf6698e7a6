"""Accuracy against batch size as one picture: the running statistics' reason to exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.plots.figure import NOTE, clear_frame, draw_source, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bncli.evaluation.sweep import SweepPoint

EVAL, BATCH = "#2f6199", "#c0392b"  # as far apart for the colour-blind as for others
SIZE = (8.0, 4.6)  # inches
MIN_GAP = 0.075  # between sizes that are named, of the axis
LEAST_ROOM, NAME_HEIGHT = 0.3, 0.1  # of the axis: below a line for its name, and of a name on two lines


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
        draw_source(figure, source, at=0.02)

    save_figure(path, SIZE, draw)


def _set_axes(axis: Axes, sizes: list[int], num_classes: int) -> None:
    from matplotlib.ticker import NullLocator, PercentFormatter

    axis.set_xscale("log", base=2)
    named = _apart(sizes)
    axis.set_xticks(sizes, [str(size) if size in named else "" for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    margin = 1.18  # a factor: half the distance of neighbours, or less, on this axis
    axis.set_xlim(sizes[0] / margin, sizes[-1] * margin)
    axis.set_ylim(0, 1.08)  # room for the name of a line at 100 %
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel("images in the batch (log scale)", color=NOTE, loc="left")
    axis.set_ylabel("test accuracy", color=NOTE)
    clear_frame(axis, grid="both")
    axis.axhline(1 / num_classes, color=NOTE, linewidth=0.9, linestyle=(0, (4, 3)))
    axis.annotate(
        f"guessing:\n1 of {num_classes}", (1.0, 1 / num_classes), xycoords=("axes fraction", "data"),
        xytext=(38, 0), textcoords="offset points", va="center", color=NOTE, fontsize=8,
    )  # fmt: skip


def _apart(sizes: list[int]) -> set[int]:
    """Those with room for a number below or beside each, the first and the last among them."""
    first, last = sizes[0], sizes[-1]
    least = (last / first) ** MIN_GAP
    named = [first]
    for size in sizes[1:-1]:
        if size >= named[-1] * least and size * least <= last:
            named.append(size)
    return {*named, last}


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
        f"eval mode, running statistics: {flat} in batches of any size", (0.015, max(high, 0.04)),
        xycoords=("axes fraction", "data"), xytext=(0, 8), textcoords="offset points", va="bottom",
        color=EVAL, fontweight="bold",
    )  # fmt: skip
    apart = [
        (size, accuracy)
        for size, accuracy in zip(measured.sizes, measured.accuracies, strict=True)
        if accuracy < low - 0.04  # closer to the other line there is no room for a number
    ]
    named = _apart(measured.sizes) if measured.sizes else set()
    for size, accuracy in apart:
        if size in named:
            axis.annotate(
                f"{accuracy:.1%}", (size, accuracy), xytext=(8, -4), textcoords="offset points",
                va="top", color=BATCH, fontsize=8,
            )  # fmt: skip
    if measured.sizes:
        _name_batch_line(axis, apart or [(measured.sizes[0], low)], plain)
    if missing := [size for size in plain.sizes if size not in measured.sizes]:
        axis.annotate(
            f"batch of {', '.join(map(str, missing))}: refused, one value per channel has no variance",
            (1.0, 0.0), xycoords="axes fraction", xytext=(0, -22), textcoords="offset points", ha="right",
            va="top", color=BATCH, fontsize=8,
        )  # fmt: skip


def _name_batch_line(axis: Axes, points: list[tuple[int, float]], plain: _Line) -> None:
    """Below the line and right of one of these points, or above the other line where the axis ends below."""
    middle = (plain.sizes[0] * plain.sizes[-1]) ** 0.5
    in_left_half = [point for point in points if point[0] <= middle]
    size, accuracy = in_left_half[-1] if in_left_half else points[0]
    has_room = accuracy >= LEAST_ROOM
    y = accuracy if has_room else max([*plain.accuracies, LEAST_ROOM - 0.12]) + 0.12 + NAME_HEIGHT
    axis.annotate(
        "batch statistics, as in train mode:\nmean and variance of the batch itself", (size, y),
        xytext=(26 if in_left_half else -12, -24 if has_room else 0), textcoords="offset points", va="top",
        ha="left" if in_left_half else "right", color=BATCH, fontweight="bold",
    )  # fmt: skip
