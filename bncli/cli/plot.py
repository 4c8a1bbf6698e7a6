"""The running statistics of all layers as one figure: a row per layer, a column per quantity.

Every row shows the layer's channels: a thin line from the smallest to the largest, a bar over the middle
half, a mark at the median, and the channels themselves as dots. Layer names stand at the left, where long
ones have room; what could not be drawn, and what is wrong with a layer, stands at the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.figure import GRID, NOTE, check_suffix, save_figure
from bncli.errors import BncliError

if TYPE_CHECKING:  # drawing is rare: the command line starts without torch and matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from bncli.stats.layers import LayerStats

DOT, BAR, MEDIAN, FLAGGED = "#7fa8d1", "#2f6199", "#0b2545", "#c0392b"
BAND = "#f4f6f9"
ROW_HEIGHT, MARGINS = 0.27, 1.55  # inches; margins hold the title and the axis labels
WIDTH, NOTES_WIDTH = 11.0, 2.0  # inches
MAX_PIXELS = 60_000  # matplotlib's limit is 65,535 to a side


@dataclass(frozen=True)
class _Column:
    """One quantity of every layer; values that are not finite, or not positive on a log scale, are gone."""

    title: str
    label: str  # of the axis, with the unit
    log: bool
    values: list[Tensor]  # per layer, float64, those that can be drawn
    notes: list[str]  # per layer, what was left out; "" for nothing


def plot_running_stats(layers: Sequence[LayerStats], path: Path) -> None:
    """Draw running_mean, running_var and |weight| / sqrt(running_var + eps) of every layer into a file.

    The suffix of `path` selects PNG or SVG. The same layers give the same bytes.

    Raises BncliError for no layers, another suffix, or a path that cannot be written.
    """
    from bncli.stats.audit import layer_flags

    check_suffix(path)
    if not layers:
        raise BncliError(f"{path}: nothing to draw: there are no BatchNorm layers")
    columns = _columns(layers)
    flags = [layer_flags(layer) for layer in layers]
    notes = _notes(columns, flags)
    width = WIDTH + (NOTES_WIDTH if any(notes) else 0.0)
    height = MARGINS + ROW_HEIGHT * len(layers)

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained", wspace=0.03)
        figure.suptitle(_title(layers, flags), fontsize=12, fontweight="bold")
        axes = figure.subplots(1, len(columns), sharey=True)
        for axis, column in zip(axes, columns, strict=True):
            _draw_column(axis, column, flags)
        _label_rows(axes[0], axes[-1], layers, flags, notes)

    save_figure(path, (width, height), draw, dpi=min(150, MAX_PIXELS / height))


def _notes(columns: list[_Column], flags: list[tuple[str, ...]]) -> list[str]:
    """Per layer, on one or two lines: its flags, and what could not be drawn."""
    notes = []
    for row, names in enumerate(flags):
        lost = [column.notes[row] for column in columns if column.notes[row]]
        notes.append("\n".join(filter(None, [", ".join(names), "; ".join(lost)])))
    return notes


def _title(layers: Sequence[LayerStats], flags: list[tuple[str, ...]]) -> str:
    channels = sum(layer.num_features for layer in layers)
    title = f"Running statistics of {_plural(len(layers), 'BatchNorm layer')}"
    num_flagged = sum(1 for names in flags if names)
    flagged = f", {num_flagged} flagged" if num_flagged else ""
    return f"{title} ({_plural(channels, 'channel')}{flagged})"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _columns(layers: Sequence[LayerStats]) -> list[_Column]:
    assumed = "" if all(layer.eps is not None for layer in layers) else ", eps = 1e-5 assumed"
    means = [layer.running_mean for layer in layers]
    variances = [layer.running_var for layer in layers]
    gain = f"|weight| / sqrt(running_var + eps){assumed}\n1 / activation units, log scale"
    return [
        _column("running_mean", "activation units", False, means),
        _column("running_var", "activation units², log scale", True, variances),
        _column("gain", gain, True, [_gain(layer) for layer in layers]),
    ]


def _column(title: str, label: str, log: bool, tensors: Sequence[Tensor | None]) -> _Column:
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
    return _Column(title, label, log, values, notes)


def _gain(layer: LayerStats) -> Tensor | None:
    """By how much eval mode multiplies each channel (C,); a layer without weight multiplies by 1."""
    import torch

    from bncli.stats.audit import DEFAULT_EPS

    if layer.running_var is None:
        return None
    scale = (layer.running_var.double() + (DEFAULT_EPS if layer.eps is None else layer.eps)).sqrt()
    return (torch.ones(()) if layer.weight is None else layer.weight.double().abs()) / scale


def _draw_column(axis: Axes, column: _Column, flags: list[tuple[str, ...]]) -> None:
    for row in range(0, len(flags), 2):
        axis.axhspan(row - 0.5, row + 0.5, color=BAND, zorder=0)
    if column.log:
        _set_log_scale(axis, column.values)
    else:
        axis.axvline(0, color=NOTE, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
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
    """Ticks at powers of ten, or at 1, 2 and 5 where the values span little; labelled 0.01, not 10⁻²."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    drawn = [float(bound) for numbers in values if numbers.numel() for bound in numbers.aminmax()]
    narrow = not drawn or max(drawn) < 100 * min(drawn)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=8))
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


def _label_rows(
    left: Axes,
    right: Axes,
    layers: Sequence[LayerStats],
    flags: list[tuple[str, ...]],
    notes: list[str],
) -> None:
    left.set_yticks(range(len(layers)), [f"{x.name or '(model)'}  ({x.num_features})" for x in layers])
    left.set_ylim(len(layers) - 0.5, -0.5)  # the first layer on top
    left.set_ylabel("layer (channels)", color=NOTE)
    for row, (label, note) in enumerate(zip(left.get_yticklabels(), notes, strict=True)):
        if flags[row]:
            label.set_color(FLAGGED)
        right.text(
            1.02, row, note, transform=right.get_yaxis_transform(), color=FLAGGED, va="center",
            fontsize=7, linespacing=1.1,
        )  # fmt: skip
