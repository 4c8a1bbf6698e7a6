"""The gap as one picture: accuracy by where the statistics come from, and how stale each layer is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.messages import shorten
from bncli.cli.plots.figure import NOTE, clear_frame, draw_source, save_figure, text_width
from bncli.cli.plots.scale import Scale, choose_scale, number_text

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
MAX_NAME = 44  # letters; of a longer name the end tells layers apart
BARS_WIDTH = 7.0  # inches, beside the names
LABEL_SIZE = 8.0  # points
STRETCH = 1e6  # every bar ends on the scale


def plot_gap(gap: Gap, path: Path, *, source: str) -> None:
    """Draw the four accuracies, and every layer's self-consistency; the worst layer is red.

    `source` says below the picture what was measured. The suffix of `path` selects PNG or SVG. Of more than
    40 layers the least consistent are shown.

    Raises BncliError for another suffix, or a path that cannot be written.
    """
    layers = _shown(gap.layers)
    names = [shorten(layer.name, MAX_NAME) or "(model)" for layer in layers]
    width = BARS_WIDTH + text_width([*BARS.values(), *names], 9.0)
    height = 2.3 + 0.3 * (len(BARS) + max(2, len(layers)))  # inches

    def draw(figure: Figure) -> None:
        bottom = 0.42 / height
        figure.set_layout_engine("constrained", rect=(0.0, bottom, 1.0, 1.0 - bottom))
        above, below = figure.subplots(2, height_ratios=(len(BARS), max(2, len(layers))))
        _draw_accuracies(above, gap)
        _draw_layers(below, layers, names, gap)
        draw_source(figure, source, at=0.12 / height)

    save_figure(path, (width, height), draw)


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


def _draw_layers(axis: Axes, layers: list[LayerGap], names: list[str], gap: Gap) -> None:
    import torch

    scores = torch.tensor([layer.self_consistency for layer in layers], dtype=torch.float64)
    scale = choose_scale(scores, include=(0.0,), stretch=STRETCH)
    # what is no number reaches as far as anything does, and its label says so
    places = scale.place(scores.nan_to_num(torch.inf, posinf=torch.inf)).clamp(max=scale.high).tolist()
    colours = [STALE if layer.name == gap.worst_layer else PLAIN for layer in layers]
    labels = [_label(layer) for layer in layers]
    _draw_bars(axis, names, places, colours, labels)
    words = text_width(labels, LABEL_SIZE) + 0.3  # behind the longest bar
    axis.set_xlim(0, scale.high * BARS_WIDTH / (BARS_WIDTH - words))
    ticks = scale.ticks()
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_xlabel(_axis_label(scale), color=NOTE)
    axis.set_title(
        "How stale each layer's running statistics are", fontsize=10, fontweight="bold", loc="left"
    )


def _axis_label(scale: Scale) -> str:
    label = "distance from the layer's real input in eval mode; 0 is self-consistent"
    return f"{label}\nlogarithmic beyond {number_text(scale.linear_to)}" if scale.kind == "symlog" else label


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
    axis.set_ylim(len(names) - 0.5, -0.5)
    clear_frame(axis, grid="x")
    for place, value, label in zip(places, values, labels, strict=True):
        axis.annotate(
            label, (value, place), xytext=(5, 0), textcoords="offset points", va="center",
            fontsize=LABEL_SIZE,
        )  # fmt: skip
