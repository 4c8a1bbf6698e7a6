"""The gap as one picture: accuracy by where the statistics come from, and how stale each layer is."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.messages import one_line
from bncli.cli.plots.figure import GRID, NOTE, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bncli.evaluation import Gap, LayerGap

PLAIN, STALE = "#2f6199", "#c0392b"
BARS = {
    "running": "running statistics",
    "batch": "batch statistics",
    "precise": "population, precise",
    "exact": "population, exact",
}
MAX_LAYERS = 40  # more names than that cannot be read


def plot_gap(gap: Gap, path: Path, *, source: str) -> None:
    """Draw the four accuracies, and every layer's self-consistency; the worst layer is red.

    `source` says below the picture what was measured. The suffix of `path` selects PNG or SVG. Of more than
    40 layers the least consistent are shown.

    Raises BncliError for another suffix, or a path that cannot be written.
    """
    layers = _shown(gap.layers)

    def draw(figure: Figure) -> None:
        bottom = 0.42 / height
        figure.set_layout_engine("constrained", rect=(0.0, bottom, 1.0, 1.0 - bottom))
        above, below = figure.subplots(2, height_ratios=(len(BARS), max(2, len(layers))))
        _draw_accuracies(above, gap)
        _draw_layers(below, layers, gap)
        figure.text(0.012, 0.12 / height, source, color=NOTE, fontsize=7.5)

    height = 2.1 + 0.3 * (len(BARS) + max(2, len(layers)))  # inches
    save_figure(path, (8.0, height), draw)


def _shown(layers: tuple[LayerGap, ...]) -> list[LayerGap]:
    worst = sorted(layers, key=lambda layer: layer.self_consistency, reverse=True)[:MAX_LAYERS]
    return [layer for layer in layers if layer in worst]


def _draw_accuracies(axis: Axes, gap: Gap) -> None:
    from matplotlib.ticker import PercentFormatter

    values = [getattr(gap, name).accuracy for name in BARS]
    colours = [STALE if gap.batch_norm_is_to_blame else PLAIN, PLAIN, PLAIN, PLAIN]
    _draw_bars(axis, list(BARS.values()), values, colours, [f"{value:.2%}" for value in values])
    axis.set_xlim(0, 1.12)
    axis.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_title(
        "Accuracy on the same test images, by where BatchNorm takes its statistics from",
        fontsize=10, fontweight="bold", loc="left",
    )  # fmt: skip


def _draw_layers(axis: Axes, layers: list[LayerGap], gap: Gap) -> None:
    scores = [layer.self_consistency for layer in layers]
    colours = [STALE if layer.name == gap.worst_layer else PLAIN for layer in layers]
    top = max([*(score for score in scores if isfinite(score)), 1e-9])
    shown = [score if isfinite(score) else top for score in scores]
    _draw_bars(axis, [one_line(layer.name) for layer in layers], shown, colours, list(map(_label, layers)))
    axis.set_xlim(0, 1.45 * top)  # room for the words behind the longest bar
    axis.set_xlabel("distance from the layer's real input in eval mode; 0 is self-consistent", color=NOTE)
    axis.set_title(
        "How stale each layer's running statistics are", fontsize=10, fontweight="bold", loc="left"
    )


def _label(layer: LayerGap) -> str:
    score = f"{layer.self_consistency:.2g}"
    if layer.recovered is None:
        return score
    return f"{score}; repaired alone {100 * layer.recovered:+.1f} points"


def _draw_bars(
    axis: Axes, names: list[str], values: list[float], colours: list[str], labels: list[str]
) -> None:
    places = list(range(len(names)))
    axis.barh(places, values, color=colours, height=0.62)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.grid(axis="x", color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for place, value, label in zip(places, values, labels, strict=True):
        axis.annotate(
            label, (value, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
