"""Layers x channels as colours: a row per layer, stretched to one width however many channels it has.

A layer with more channels than the picture has cells shows, of the channels that share a cell, the one
farthest from the scale's middle, so that no outlier is averaged away. What is no number (NaN or infinity,
also the logarithm of a variance that is not positive) wins over all of them and has a colour of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bncli.cli.plots.figure import NOTE
from bncli.cli.plots.rows import FLAGGED, Flags

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from torch import Tensor

NUM_CELLS = 512  # per row
NO_NUMBER = "#ff00c8"  # in neither scale of colours, and unlike both for the colour-blind too
MISSING = "#e8eaed"  # a layer without running statistics


@dataclass(frozen=True)
class HeatMap:
    """One quantity of every layer: (C,) float64 each, or None where it has none."""

    title: str
    label: str  # of the scale, with the unit
    values: Sequence[Tensor | None]
    middle: float | None  # of a scale that has two sides; None: from the smallest to the largest


def resample(values: Tensor, middle: float, num_cells: int = NUM_CELLS) -> Tensor:
    """A layer's channels (C,) as cells (num_cells,), each channel or its group equally wide.

    NaN where one of a cell's channels is not finite.
    """
    import torch

    num_channels = len(values)
    if num_channels <= num_cells:
        return values.where(values.isfinite(), torch.nan)[torch.arange(num_cells) * num_channels // num_cells]
    distance = (values - middle).abs().nan_to_num(torch.inf, posinf=torch.inf)
    cells = torch.arange(num_channels) * num_cells // num_channels
    order = distance.argsort(stable=True)  # the farthest of each cell is written last
    farthest = torch.zeros(num_cells, dtype=torch.long)
    for cell, channel in zip(cells[order].tolist(), order.tolist(), strict=True):
        farthest[cell] = channel
    chosen = values[farthest]
    return chosen.where(chosen.isfinite(), torch.nan)


def draw_heat_map(axis: Axes, heat_map: HeatMap) -> None:
    """Draw all rows with their scale of colours below, and say what the other colours mean."""
    import torch

    finite = [values[values.isfinite()] for values in heat_map.values if values is not None]
    numbers = torch.cat([*finite, torch.zeros(0, dtype=torch.float64)])
    low, high, extend = _limits(numbers, heat_map.middle)
    middle = (low + high) / 2 if heat_map.middle is None else heat_map.middle
    rows = [
        torch.full((NUM_CELLS,), torch.nan) if values is None or not len(values) else resample(values, middle)
        for values in heat_map.values
    ]
    image = axis.imshow(
        torch.stack([row.double() for row in rows]).numpy(), cmap=_colours(heat_map.middle is not None),
        vmin=low, vmax=high, aspect="auto", interpolation="nearest", extent=(0, 1, len(rows) - 0.5, -0.5),
    )  # fmt: skip
    missing = [row for row, values in enumerate(heat_map.values) if values is None]
    for row in missing:
        axis.axhspan(row - 0.5, row + 0.5, color=MISSING, linewidth=0)
    for row in range(1, len(rows)):
        axis.axhline(row - 0.5, color="white", linewidth=0.8)
    damaged = any(bool(row.isnan().any()) for i, row in enumerate(rows) if i not in missing)
    _frame(axis, heat_map, damaged=damaged, missing=bool(missing))
    bar = axis.figure.colorbar(
        image, ax=axis, location="bottom", extend=extend, shrink=0.7, aspect=40, pad=0.02, fraction=0.08
    )
    bar.set_label(heat_map.label, color=NOTE)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8)


def _frame(axis: Axes, heat_map: HeatMap, *, damaged: bool, missing: bool) -> None:
    axis.set_title(heat_map.title, fontsize=10)
    axis.set_xticks([0, 1], ["first channel", "last"])
    first, last = axis.get_xticklabels()
    first.set(horizontalalignment="left", color=NOTE)
    last.set(horizontalalignment="right", color=NOTE)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    meanings = {NO_NUMBER: "not finite, or a variance ≤ 0", MISSING: "no running statistics"}
    shown = [colour for colour, there in ((NO_NUMBER, damaged), (MISSING, missing)) if there]
    if shown:
        from matplotlib.patches import Patch

        what = [Patch(color=colour, label=meanings[colour]) for colour in shown]
        axis.legend(
            handles=what, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False, fontsize=8
        )


def _limits(numbers: Tensor, middle: float | None) -> tuple[float, float, Any]:
    """The ends of the scale, and on which side values lie beyond: a few outliers do not flatten the rest."""
    if not numbers.numel():
        return -1.0, 1.0, "neither"
    ordered = numbers.sort().values
    smallest, largest = float(ordered[0]), float(ordered[-1])
    margin = len(ordered) // 200  # half a per cent on each side
    low, high = float(ordered[margin]), float(ordered[-1 - margin])
    if middle is not None:
        # a few channels that stand on eps alone are hundreds of deviations away
        typical = float((ordered - middle).abs().median())
        reach = max(abs(low - middle), abs(high - middle), 1e-6)
        reach = min(reach, 10 * typical) if typical > 0 else reach
        low, high = middle - reach, middle + reach
    elif high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    beyond = (smallest < low, largest > high)
    return (
        low,
        high,
        {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither"),
    )


def _colours(two_sided: bool) -> Colormap:
    import matplotlib as mpl

    return mpl.colormaps["PuOr" if two_sided else "viridis"].with_extremes(bad=NO_NUMBER)


def label_heat_map(axis: Axes, names: Sequence[str], flags: Flags) -> None:
    """Names at the left."""
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel("layer (channels)", color=NOTE)
    for label, found in zip(axis.get_yticklabels(), flags, strict=True):
        if found:
            label.set_color(FLAGGED)
