"""A row per layer and a column per quantity: what the pictures of layers share.

Every row shows the layer's channels: a thin line from the smallest to the largest, a bar over the middle
half, a mark at the median, and the channels themselves as dots. Layer names stand at the left, where long
ones have room; what could not be drawn, and what is wrong with a layer, stands at the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bncli.cli.messages import one_line
from bncli.cli.plots.figure import GRID, NOTE

if TYPE_CHECKING:  # drawing is rare: the command line starts without torch and matplotlib
    from matplotlib.axes import Axes
    from torch import Tensor

DOT, BAR, MEDIAN, FLAGGED = "#7fa8d1", "#2f6199", "#0b2545", "#c0392b"
BAND = "#f4f6f9"
ROW_HEIGHT, MARGINS = 0.27, 1.55  # inches; margins hold the title and the axis labels
WIDTH, NOTES_WIDTH = 11.0, 2.0  # inches
MAX_PIXELS = 60_000  # matplotlib's limit is 65,535 to a side
MAX_NAME = 44  # letters; of a longer name the end tells layers apart

Flags = Sequence[tuple[str, ...]]  # per layer


@dataclass(frozen=True)
class Column:
    """One quantity of every layer; values that are not finite, or not positive on a log scale, are gone."""

    title: str
    label: str  # of the axis, with the unit
    log: bool
    values: list[Tensor]  # per layer, float64, those that can be drawn
    notes: list[str]  # per layer, what was left out; "" for nothing


def row_notes(columns: Sequence[Column], flags: Flags) -> list[str]:
    """Per layer, on one or two lines: its flags, and what could not be drawn."""
    notes = []
    for row, names in enumerate(flags):
        lost = [column.notes[row] for column in columns if column.notes[row]]
        notes.append("\n".join(filter(None, [", ".join(names), "; ".join(lost)])))
    return notes


def make_column(title: str, label: str, log: bool, tensors: Sequence[Tensor | None]) -> Column:
    """Per layer (C,) of any dtype, or None where it has no such numbers."""
    import torch

    values, notes = [], []
    for tensor in tensors:
        numbers = torch.zeros(0) if tensor is None else tensor
        numbers = numbers.double()
        drawn = numbers[numbers.isfinite()]
        note = []
        if num_lost := numbers.numel() - drawn.numel():
            note.append(f"{num_lost} non-finite")
        if log and (num_lost := int((drawn <= 0).sum())):
            note.append(f"{num_lost} at 0" if bool((drawn >= 0).all()) else f"{num_lost} ≤ 0")
            drawn = drawn[drawn > 0]
        values.append(drawn)
        notes.append(f"{title}: {', '.join(note)}" if note else "")
    return Column(title, label, log, values, notes)


def row_name(name: str, num_features: int) -> str:
    """As it stands at the left of its row."""
    text = one_line(name) or "(model)"
    return f"{text if len(text) <= MAX_NAME else '…' + text[-MAX_NAME + 1 :]}  ({num_features})"


def draw_column(axis: Axes, column: Column, flags: Flags, *, neutral: float | None = None) -> None:
    """Draw all rows, with a dashed line at the `neutral` value, where there is one."""
    for row in range(0, len(flags), 2):
        axis.axhspan(row - 0.5, row + 0.5, color=BAND, zorder=0)
    """Draw all rows, with a dashed line at the `neutral` value, where there is one."""
    if column.log:
        _set_log_scale(axis, column.values)
    if neutral is not None:
        axis.axvline(neutral, color=NOTE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for row, values in enumerate(column.values):
        if values.numel():
            _draw_row(axis, row, values, FLAGGED if flags[row] else BAR)
    axis.set_title(column.title, fontsize=10)
    axis.set_xlabel(column.label, color=NOTE)
    axis.grid(axis="x", color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _set_log_scale(axis: Axes, values: list[Tensor]) -> None:
    """Ticks at powers of ten, or closer where the values span little; labelled 0.01, not 10⁻²."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    drawn = [float(bound) for numbers in values if numbers.numel() for bound in numbers.aminmax()]
    narrow = not drawn or max(drawn) < 100 * min(drawn)
    subs: tuple[float, ...] = (1, 2, 5) if narrow else (1,)
    if narrow and (not drawn or max(drawn) < 4 * min(drawn)):
        subs = (1, 1.2, 1.5, 2, 3, 5, 7, 8.5)
    axis.set_xscale("log")
    # a scale of less than an octave is nearly linear, and may not hold any of those
    flat = drawn and max(drawn) < 2 * min(drawn)
    axis.xaxis.set_major_locator(MaxNLocator(5) if flat else LogLocator(subs=subs, numticks=8))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_row(axis: Axes, row: int, values: Tensor, colour: str) -> None:
    import torch

    ordered = values.sort().values
    quartiles = ordered.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=ordered.dtype)).tolist()
    # the golden ratio spreads neighbours in rank evenly over the row's height, without a random number
    height = (torch.arange(len(ordered)) * 0.618034) % 1 - 0.5
    dots = "#e3a49c" if colour == FLAGGED else DOT
    span, middle = [float(ordered[0]), float(ordered[-1])], [quartiles[0], quartiles[2]]
    dot_rows = (row + 0.72 * height).tolist()
    # pixels even in an SVG, where the 26,000 channels of a ResNet-50 would take 10 MB
    axis.plot(ordered.tolist(), dot_rows, "o", color=dots, ms=2.2, mew=0, alpha=0.55, rasterized=True)
    axis.plot(span, [row, row], color=colour, linewidth=0.8)
    axis.plot(middle, [row, row], color=colour, linewidth=4.5, solid_capstyle="round")
    axis.plot(quartiles[1:2], [row], "o", color="white", ms=4.2, mec=MEDIAN, mew=1.0)


def label_rows(left: Axes, right: Axes, names: Sequence[str], flags: Flags, notes: Sequence[str]) -> None:
    """Names at the left, notes at the right; the first layer on top."""
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_ylabel("layer (channels)", color=NOTE)
    for row, (label, note) in enumerate(zip(left.get_yticklabels(), notes, strict=True)):
        if flags[row]:
            label.set_color(FLAGGED)
        right.text(
            1.02, row, note, transform=right.get_yaxis_transform(), color=FLAGGED, va="center",
            fontsize=7, linespacing=1.1,
        )  # fmt: skip
