"""Layers x channels as colours: a row per layer, stretched to one width however many channels it has.

A layer with more channels than the picture has cells shows, of the channels that share a cell, the one
farthest from the scale's middle, so that no outlier is averaged away. What is no number (NaN or infinity,
also the logarithm of a variance that is not positive) wins over all of them and has a colour of its own, and
so has what lies beyond either end of the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from bncli.cli.plots.figure import NOTE, clear_frame
from bncli.cli.plots.rows import FLAGGED, TICK_SIZE, Flags
from bncli.cli.plots.scale import Scale, choose_scale, number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from torch import Tensor

NUM_CELLS = 512  # per row
NO_NUMBER = "#ff00c8"  # in neither scale of colours, and unlike both for the colour-blind too
MISSING = "#e8eaed"  # a layer without running statistics


class Colours(NamedTuple):
    """A map of matplotlib's, and colours that are not in it for what lies beyond its ends."""

    name: str
    below: str
    above: str


TWO_SIDED = Colours("PuOr", "#fff200", "#00d8ff")
ONE_SIDED = Colours("viridis", "#b5dcff", "#ff5a00")


@dataclass(frozen=True)
class HeatMap:
    """One quantity of every layer."""

    title: str
    label: str  # of the scale, with the unit
    scale: Scale
    places: Tensor  # (layers, NUM_CELLS) float64, on the scale; NaN for what has none
    missing: list[int]  # layers without the quantity
    colours: Colours
    meanings: dict[str, str]  # of the colours that are not on the scale


def make_heat_map(
    title: str, label: str, layers: Sequence[Tensor | None], *,
    log: bool = False, middle: float | None = None, resolution: float = 0.0,
) -> HeatMap:  # fmt: skip
    """Per layer (C,) of any dtype, or None where it has no such numbers; more in `choose_scale`.

    Of the channels, and of the picture's cells, at most 1 % each lie beyond the scale.
    """
    import torch

    def scale_of(*samples: Tensor) -> Scale:
        return choose_scale(*samples, log=log, middle=middle, resolution=resolution)

    nothing = torch.full((NUM_CELLS,), torch.nan, dtype=torch.float64)
    values = [nothing if x is None or not len(x) else x.double() for x in layers]
    channels = torch.cat([x for x in values if x is not nothing] or [nothing])
    # which of a cell's channels is farthest depends on the scale, and the scale on what the cells show
    scale = scale_of(channels)
    centre = (scale.low + scale.high) / 2
    shown = torch.stack([x[_channel_of_cell(_finite(scale.place(x), x), centre, NUM_CELLS)] for x in values])
    scale = scale_of(channels, shown.flatten())
    places = _finite(scale.place(shown), shown)
    missing = [row for row, x in enumerate(layers) if x is None]
    damaged = [row for row, x in enumerate(values) if x is not nothing and bool(places[row].isnan().any())]
    colours = ONE_SIDED if middle is None else TWO_SIDED
    meanings = dict(zip(colours[1:], scale.notes("channel"), strict=True)) | {
        NO_NUMBER: "not finite, or a variance ≤ 0" if damaged else "",
        MISSING: "no running statistics" if missing else "",
    }
    present = {colour: meaning for colour, meaning in meanings.items() if meaning}
    return HeatMap(title, label, scale, places, missing, colours, present)


def _finite(places: Tensor, values: Tensor) -> Tensor:
    import torch

    return places.where(values.isfinite() & places.isfinite(), torch.nan)


def resample(values: Tensor, middle: float, num_cells: int = NUM_CELLS) -> Tensor:
    """A layer's channels (C,) as cells (num_cells,), each channel or its group equally wide.

    NaN where one of a cell's channels is not finite.
    """
    import torch

    chosen = values[_channel_of_cell(values, middle, num_cells)]
    return chosen.where(chosen.isfinite(), torch.nan)


def _channel_of_cell(places: Tensor, middle: float, num_cells: int) -> Tensor:
    """Which channel each cell (num_cells,) shows: of those that share it the farthest from the middle."""
    import torch

    num_channels = len(places)
    if num_channels <= num_cells:
        return torch.arange(num_cells) * num_channels // num_cells
    distance = (places - middle).abs().nan_to_num(torch.inf, posinf=torch.inf)
    cells = torch.arange(num_channels) * num_cells // num_channels
    order = distance.argsort(stable=True)  # the farthest of each cell is written last
    farthest = torch.zeros(num_cells, dtype=torch.long)
    for cell, channel in zip(cells[order].tolist(), order.tolist(), strict=True):
        farthest[cell] = channel
    return farthest


def draw_heat_map(axis: Axes, bar_axis: Axes, heat_map: HeatMap) -> None:
    """Draw all rows, and the scale of colours on an axis of its own."""
    import matplotlib as mpl

    scale, (name, below, above) = heat_map.scale, heat_map.colours
    image = axis.imshow(
        heat_map.places.numpy(), vmin=scale.low, vmax=scale.high, aspect="auto", interpolation="nearest",
        cmap=mpl.colormaps[name].with_extremes(bad=NO_NUMBER, under=below, over=above),
        extent=(0, 1, len(heat_map.places) - 0.5, -0.5),
    )  # fmt: skip
    for row in heat_map.missing:
        axis.axhspan(row - 0.5, row + 0.5, color=MISSING, linewidth=0)
    for row in range(1, len(heat_map.places)):
        axis.axhline(row - 0.5, color="white", linewidth=0.8)
    axis.set_title(heat_map.title, fontsize=10)
    axis.set_xticks([0, 1], ["first channel", "last"], color=NOTE, fontsize=8)
    first, last = axis.get_xticklabels()
    first.set(horizontalalignment="left")
    last.set(horizontalalignment="right")
    clear_frame(axis, grid=None)
    _draw_bar(bar_axis, image, heat_map.label, scale)


def _draw_bar(axis: Axes, image: AxesImage, label: str, scale: Scale) -> None:
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}
    beyond = extend.get((scale.num_below > 0, scale.num_above > 0), "neither")
    bar = axis.figure.colorbar(image, cax=axis, orientation="horizontal", extend=beyond, extendfrac=0.03)
    ticks = scale.ticks()
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    symlog = f", logarithmic beyond ±{number_text(scale.linear_to)}" if scale.kind == "symlog" else ""
    bar.set_label(label + symlog, color=NOTE, fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", length=0, labelsize=TICK_SIZE)
    bar.ax.minorticks_off()


def draw_meanings(axis: Axes, heat_map: HeatMap) -> None:
    """What the colours mean that are not on the scale, on an axis of their own."""
    from matplotlib.patches import Patch

    axis.set_axis_off()
    patches = [
        Patch(facecolor=colour, edgecolor=NOTE, linewidth=0.4, label=meaning)
        for colour, meaning in heat_map.meanings.items()
    ]
    if patches:
        axis.legend(handles=patches, loc="upper center", borderaxespad=0, frameon=False, fontsize=8)


def label_heat_map(axis: Axes, names: Sequence[str], flags: Flags) -> None:
    """Names at the left."""
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel("layer (channels)", color=NOTE)
    for label, found in zip(axis.get_yticklabels(), flags, strict=True):
        if found:
            label.set_color(FLAGGED)
