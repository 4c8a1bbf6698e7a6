"""The running statistics of all layers as one figure: distributions above, heat maps below.

Above, a row per layer and a column per quantity show how the channels are distributed; below, a row per
layer shows its channels one beside the other, in their order, so that single damaged ones are seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.plots.figure import check_suffix, save_figure
from bncli.cli.plots.heat_map import HeatMap, draw_heat_map, draw_meanings, label_heat_map, make_heat_map
from bncli.cli.plots.rows import (
    MAX_PIXELS,
    Column,
    Flags,
    draw_column,
    figure_size,
    label_rows,
    make_column,
    row_name,
    row_notes,
)
from bncli.errors import BncliError
from bncli.wording import plural

if TYPE_CHECKING:  # drawing is rare: the command line starts without torch and matplotlib
    from matplotlib.figure import Figure
    from torch import Tensor

    from bncli.batchnorm.audit.audit_layers import Finding
    from bncli.batchnorm.layers import LayerStats

MAP_ROW_HEIGHT, MAP_MARGINS = 0.2, 0.75  # inches; margins hold the title and the ends of the rows
BAR_HEIGHT, MEANING_HEIGHT = 0.6, 0.19  # inches; of the scale of colours, and of a line below it
MEAN_RESOLUTION, DEVIATION_RESOLUTION = 0.1, 0.01  # standard deviations that no position, no colour tells


def plot_running_stats(layers: Sequence[LayerStats], findings: Sequence[Finding], path: Path) -> None:
    """Draw running_mean, running_var and |weight| / sqrt(running_var + eps) of every layer into a file.

    Beside a layer stands what the audit found in it.

    The suffix of `path` selects PNG or SVG. The same layers give the same bytes.

    Raises BncliError for no layers, another suffix, or a path that cannot be written.
    """
    from bncli.cli.tables.inspect_stats import flags_of

    check_suffix(path)
    if not layers:
        raise BncliError(f"{path}: nothing to draw: there are no BatchNorm layers")
    columns, maps = _columns(layers), _heat_maps(layers)
    flags_by_layer = flags_of(findings)
    flags = [tuple(flags_by_layer[layer.name]) for layer in layers]
    notes = row_notes(columns, flags)
    names = [row_name(layer.name, layer.num_features) for layer in layers]
    width, above_height = figure_size(columns, names, notes)
    meanings_height = MEANING_HEIGHT * max(len(heat_map.meanings) for heat_map in maps)
    map_heights = MAP_ROW_HEIGHT * len(layers), 0.12, meanings_height
    heights = above_height, MAP_MARGINS + BAR_HEIGHT + sum(map_heights)

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained", wspace=0.03, hspace=0.02, w_pad=0.06, h_pad=0.06)
        ((above,), (below,)) = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)
        above.suptitle(_title(layers, flags), fontsize=12, fontweight="bold")
        axes = above.subplots(1, len(columns), sharey=True)
        for axis, column in zip(axes, columns, strict=True):
            draw_column(axis, column, flags)
        label_rows(axes[0], axes[-1], names, flags, notes)
        num_rows = 3 if meanings_height else 2
        map_axes = below.subplots(num_rows, len(maps), height_ratios=map_heights[:num_rows])
        for (axis, bar_axis, *meanings_axis), heat_map in zip(map_axes.T, maps, strict=True):
            draw_heat_map(axis, bar_axis, heat_map)
            for meaning_axis in meanings_axis:
                draw_meanings(meaning_axis, heat_map)
            axis.set_yticks([])
        label_heat_map(map_axes[0, 0], names, flags)

    height = sum(heights)
    save_figure(path, (width, height), draw, dpi=min(150, MAX_PIXELS / height))


def _title(layers: Sequence[LayerStats], flags: Flags) -> str:
    channels = sum(layer.num_features for layer in layers)
    title = f"Running statistics of {plural(len(layers), 'BatchNorm layer')}"
    num_flagged = sum(1 for names in flags if names)
    flagged = f", {num_flagged} flagged" if num_flagged else ""
    return f"{title} ({plural(channels, 'channel')}{flagged})"


def _columns(layers: Sequence[LayerStats]) -> list[Column]:
    assumed = "" if all(layer.eps is not None for layer in layers) else "\neps = 1e-5 assumed"
    means = [layer.running_mean for layer in layers]
    variances = [layer.running_var for layer in layers]
    gain = f"|weight| / sqrt(running_var + eps)\n1 / activation units, log scale{assumed}"
    return [
        make_column(
            "running_mean",
            "activation units",
            means,
            neutral=0.0,
            resolution=MEAN_RESOLUTION * _typical_deviation(layers),
        ),
        make_column("running_var", "activation units², log scale", variances, log=True),
        make_column("gain", gain, [_gain(layer) for layer in layers], log=True),
    ]


def _typical_deviation(layers: Sequence[LayerStats]) -> float:
    """The standard deviation of a channel in the middle of a layer in the middle."""
    import torch

    middles = [scale.nanmedian() for layer in layers if (scale := _scale(layer)) is not None and len(scale)]
    middle = float(torch.stack(middles).nanmedian()) if middles else 0.0
    return middle if isfinite(middle) else 0.0


def _heat_maps(layers: Sequence[LayerStats]) -> list[HeatMap]:
    deviations = []
    for layer in layers:
        scale, mean = _scale(layer), layer.running_mean
        deviations.append(None if mean is None or scale is None else mean.double() / scale)
    variances = [layer.running_var for layer in layers]
    return [
        make_heat_map("running_mean by channel", "standard deviations, sqrt(running_var + eps)", deviations,
                      middle=0.0, resolution=DEVIATION_RESOLUTION),
        make_heat_map("running_var by channel", "activation units², log scale", variances, log=True),
    ]  # fmt: skip


def _scale(layer: LayerStats) -> Tensor | None:
    """What eval mode divides each channel by (C,)."""

    if layer.running_var is None:
        return None
    return (layer.running_var.double() + layer.eps_or_default).sqrt()


def _gain(layer: LayerStats) -> Tensor | None:
    """By how much eval mode multiplies each channel (C,); a layer without weight multiplies by 1."""
    import torch

    scale = _scale(layer)
    if scale is None:
        return None
    return (torch.ones(()) if layer.weight is None else layer.weight.double().abs()) / scale
