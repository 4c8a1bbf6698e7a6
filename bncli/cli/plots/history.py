"""A run's running statistics against its batches, epoch by epoch: a line per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.messages import shorten
from bncli.cli.plots.figure import NOTE, clear_frame, draw_source, save_figure
from bncli.cli.plots.scale import choose_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bncli.training.convergence import LayerHistory

SIZE = (11.0, 4.8)  # inches
MAX_NAMED = 14  # lines with a name each; of more, only the first and the last are named
MAX_NAME = 34  # letters; of a longer name the end tells layers apart
PANELS = {
    "mean_shift_in_batch_deviations": (
        "running_mean from the epoch's batches",
        "standard deviations of the batches, RMS over channels, log scale",
    ),
    "var_ratio": (
        "running_var over that of the epoch's batches",
        "ratio, geometric mean over channels, log scale",
    ),
}


def plot_convergence(histories: Sequence[LayerHistory], path: Path, *, source: str) -> None:
    """Draw mean shift and variance ratio of every layer against the epoch; `source` names the run.

    The suffix of `path` selects PNG or SVG. The same histories give the same bytes.

    Raises BncliError for another suffix, or a path that cannot be written.
    """

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained", wspace=0.04, rect=(0.0, 0.05, 1.0, 0.95))
        figure.suptitle(
            "How the running statistics came to match the batches", fontsize=12, fontweight="bold"
        )
        axes = figure.subplots(1, len(PANELS))
        colours = _colours(len(histories))
        for axis, (field, (title, label)) in zip(axes, PANELS.items(), strict=True):
            for history, colour in zip(histories, colours, strict=True):
                _draw_line(axis, history, field, colour)
            _set_axes(axis, histories, field, title, label)
        axes[1].axhline(1, color=NOTE, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        _name_lines(axes[1], histories, colours)
        draw_source(figure, source, at=0.02)

    save_figure(path, SIZE, draw)


def _colours(count: int) -> list[str]:
    """From dark to light with the layer's depth: an order that the colour-blind see too."""
    import matplotlib as mpl
    from matplotlib.colors import to_hex

    return [to_hex(mpl.colormaps["viridis"](0.88 * i / max(count - 1, 1))) for i in range(count)]


def _draw_line(axis: Axes, history: LayerHistory, field: str, colour: str) -> None:
    values = [getattr(point, field) for point in history.epochs]
    # a gap, where there is no number or none that a log scale has a place for
    drawn = [value if value is not None and value > 0 else math.nan for value in values]
    epochs = [point.epoch for point in history.epochs]
    axis.plot(epochs, drawn, "o-", color=colour, linewidth=1.4, ms=3.5 if len(epochs) <= 30 else 0)


def _set_axes(axis: Axes, histories: Sequence[LayerHistory], field: str, title: str, label: str) -> None:
    import torch
    from matplotlib.ticker import MaxNLocator, NullLocator

    epochs = [point.epoch for history in histories for point in history.epochs]
    values = [getattr(point, field) for history in histories for point in history.epochs]
    drawn = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
    scale = choose_scale(drawn, log=True, stretch=math.inf)
    axis.set_yscale("log")
    margin = 0.05 * (scale.high - scale.low)
    axis.set_ylim(10 ** (scale.low - margin), 10 ** (scale.high + margin))
    ticks = scale.ticks()
    axis.set_yticks([10**place for place in ticks], list(ticks.values()))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("epoch", color=NOTE)
    axis.set_ylabel(label, color=NOTE)
    clear_frame(axis, grid="both")


def _name_lines(axis: Axes, histories: Sequence[LayerHistory], colours: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    named = list(zip(histories, colours, strict=True))
    title = "layer, from first to last"
    if len(named) > MAX_NAMED:
        step = (len(named) - 1) / (MAX_NAMED - 1)
        named = [named[round(i * step)] for i in range(MAX_NAMED)]
        title = f"{MAX_NAMED} of {len(histories)} layers"
    handles = [
        Line2D([], [], color=colour, marker="o", ms=3.5, label=_short(history.name))
        for history, colour in named
    ]
    legend = axis.legend(
        handles=handles, title=title, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8
    )
    legend.get_title().set_color(NOTE)


def _short(name: str) -> str:
    text = shorten(name, MAX_NAME) or "(model)"
    # matplotlib leaves a label out that begins with an underscore
    return f" {text}" if text.startswith("_") else text
