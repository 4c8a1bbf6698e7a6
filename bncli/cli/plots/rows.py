"""A row per layer and a column per quantity: what the pictures of layers share.

Every row shows the layer's channels: a thin line from the smallest to the largest, a bar over the middle
half, a mark at the median, and the channels themselves as dots; a triangle at the edge stands for a channel
beyond the scale. Layer names stand at the left, where long ones have room; what could not be drawn, and what
is wrong with a layer, stands at the right.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bncli.cli.messages import shorten
from bncli.cli.plots.figure import NOTE, clear_frame, text_width
from bncli.cli.plots.scale import Scale, choose_scale, number_text

if TYPE_CHECKING:  # drawing is rare: the command line starts without torch and matplotlib
    from matplotlib.axes import Axes
    from torch import Tensor

DOT, BAR, MEDIAN, FLAGGED = "#7fa8d1", "#2f6199", "#0b2545", "#c0392b"
BAND = "#f4f6f9"
ROW_HEIGHT, MARGINS = 0.27, 1.25  # inches; margins hold the title and the space around the rows
COLUMN_WIDTH, LINE_HEIGHT = 2.9, 0.16  # inches
NAME_SIZE, NOTE_SIZE, TICK_SIZE = 9.0, 7.0, 8.0  # points
MAX_PIXELS = 60_000  # matplotlib's limit is 65,535 to a side
MAX_NAME = 44  # letters; of a longer name the end tells layers apart
MAX_NOTE = 80  # letters in a line
STRETCH = 2.0  # how much longer an axis may become before channels far out stand at its edge
NUM_RANKS = 201  # of each layer, for a scale on which every layer counts alike

Flags = Sequence[tuple[str, ...]]  # per layer


@dataclass(frozen=True)
class Column:
    """One quantity of every layer; values that are not finite, or not positive on a log scale, are gone."""

    title: str
    label: str  # of the axis, with the unit, and with what lies beyond the scale
    scale: Scale
    neutral: float | None  # where a dashed line stands
    values: list[Tensor]  # per layer, float64, those that can be drawn
    notes: list[str]  # per layer, what was left out; "" for nothing


def row_notes(columns: Sequence[Column], flags: Flags) -> list[str]:
    """Per layer, on as many lines as needed: its flags, and what could not be drawn."""
    notes = []
    for row, names in enumerate(flags):
        lost = [column.notes[row] for column in columns if column.notes[row]]
        parts = _wrap(", ".join(names)) + _wrap("; ".join(lost))
        notes.append("\n".join(parts))
    return notes


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, MAX_NOTE, break_on_hyphens=False)


def make_column(
    title: str, label: str, tensors: Sequence[Tensor | None], *,
    log: bool = False, neutral: float | None = None, resolution: float = 0.0,
) -> Column:  # fmt: skip
    """Per layer (C,) of any dtype, or None where it has no such numbers; more in `choose_scale`."""
    import torch

    values, notes = [], []
    for tensor in tensors:
        numbers = torch.zeros(0) if tensor is None else tensor
        numbers = numbers.double()
        drawn = numbers[numbers.isfinite()]
        note = []
        if num_lost := numbers.numel() - drawn.numel():
            note.append(f"{num_lost:,} non-finite")
        if log and (num_lost := int((drawn <= 0).sum())):
            note.append(f"{num_lost:,} at 0" if bool((drawn >= 0).all()) else f"{num_lost:,} ≤ 0")
            drawn = drawn[drawn > 0]
        values.append(drawn.sort().values)
        notes.append(f"{title}: {', '.join(note)}" if note else "")
    empty = torch.zeros(0, dtype=torch.float64)
    ranks = torch.linspace(0, 1, NUM_RANKS, dtype=torch.float64)
    evenly = [x[((len(x) - 1) * ranks).round().long()] for x in values if len(x)]
    scale = choose_scale(
        torch.cat([*values, empty]), torch.cat([*evenly, empty]), log=log, resolution=resolution,
        include=() if neutral is None else (neutral,), stretch=STRETCH,
    )  # fmt: skip
    return Column(title, _label(label, scale), scale, neutral, values, notes)


def _label(label: str, scale: Scale) -> str:
    beyond = number_text(scale.linear_to)
    kind = f"logarithmic beyond ±{beyond}" if scale.kind == "symlog" else ""
    return "\n".join(filter(None, [label, kind, *scale.notes("channel")]))


def figure_size(columns: Sequence[Column], names: Sequence[str], notes: Sequence[str]) -> tuple[float, float]:
    """Width and height in inches with room for every name, note and label."""
    beside = text_width(names, NAME_SIZE) + text_width(notes, NOTE_SIZE) + 0.6
    label_lines = max(column.label.count("\n") + 1 for column in columns)
    return (
        beside + COLUMN_WIDTH * len(columns),
        MARGINS + LINE_HEIGHT * label_lines + row_height(notes) * len(names),
    )


def row_height(notes: Sequence[str]) -> float:
    """Of every row, in inches: two lines of notes have room in any."""
    lines = max((note.count("\n") + 1 for note in notes), default=1)
    return max(ROW_HEIGHT, 0.04 + 1.15 * lines * NOTE_SIZE / 72)


def row_name(name: str, num_features: int) -> str:
    """As it stands at the left of its row."""
    return f"{shorten(name, MAX_NAME) or '(model)'}  ({num_features})"


def draw_column(axis: Axes, column: Column, flags: Flags) -> None:
    """Draw all rows, with a dashed line at the neutral value, where there is one."""
    import torch

    for row in range(0, len(flags), 2):
        axis.axhspan(row - 0.5, row + 0.5, color=BAND, zorder=0)
    scale = column.scale
    if column.neutral is not None:
        neutral = float(scale.place(torch.tensor(column.neutral)))
        axis.axvline(neutral, color=NOTE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for row, values in enumerate(column.values):
        if values.numel():
            _draw_row(axis, row, scale.place(values), (scale.low, scale.high), bool(flags[row]))
    margin = 0.04 * (scale.high - scale.low)
    axis.set_xlim(scale.low - margin, scale.high + margin)
    ticks = scale.ticks()
    axis.set_xticks(list(ticks), list(ticks.values()), fontsize=TICK_SIZE)
    axis.set_title(column.title, fontsize=10)
    axis.set_xlabel(column.label, color=NOTE, fontsize=8)
    clear_frame(axis, grid="x")


def _draw_row(axis: Axes, row: int, places: Tensor, ends: tuple[float, float], is_flagged: bool) -> None:
    import torch

    colour, dots = (FLAGGED, "#e3a49c") if is_flagged else (BAR, DOT)
    quartiles = places.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=places.dtype)).clamp(*ends).tolist()
    # the golden ratio spreads neighbours in rank evenly over the row's height, without a random number
    heights = row + 0.72 * ((torch.arange(len(places)) * 0.618034) % 1 - 0.5)
    below, above = places < ends[0], places > ends[1]
    shown = places.clamp(*ends)
    span, middle = [float(shown[0]), float(shown[-1])], [quartiles[0], quartiles[2]]
    # pixels even in an SVG, where the 26,000 channels of a ResNet-50 would take 10 MB
    style: dict[str, Any] = {"linestyle": "", "color": dots, "mew": 0, "rasterized": True}
    inside = ~(below | above)
    axis.plot(shown[inside].tolist(), heights[inside].tolist(), marker="o", ms=2.2, alpha=0.55, **style)
    for outside, marker in ((below, "<"), (above, ">")):
        if bool(outside.any()):
            axis.plot(
                shown[outside].tolist(), heights[outside].tolist(), marker=marker, ms=4.5, clip_on=False,
                **{**style, "color": colour},
            )  # fmt: skip
    axis.plot(span, [row, row], color=colour, linewidth=0.8)
    axis.plot(middle, [row, row], color=colour, linewidth=4.5, solid_capstyle="round")
    axis.plot(quartiles[1:2], [row], "o", color="white", ms=4.2, mec=MEDIAN, mew=1.0)


def label_rows(left: Axes, right: Axes, names: Sequence[str], flags: Flags, notes: Sequence[str]) -> None:
    """Names at the left, notes at the right; the first layer on top."""
    left.set_yticks(range(len(names)), names, fontsize=NAME_SIZE)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_ylabel("layer (channels)", color=NOTE)
    for row, (label, note) in enumerate(zip(left.get_yticklabels(), notes, strict=True)):
        if flags[row]:
            label.set_color(FLAGGED)
        right.text(
            1.02, row, note, transform=right.get_yaxis_transform(), color=FLAGGED, va="center",
            fontsize=NOTE_SIZE, linespacing=1.1,
        )  # fmt: skip
