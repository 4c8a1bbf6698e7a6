"""Two checkpoints as one figure: a row per layer, how far each of its channels moved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.messages import shorten
from bncli.cli.plots.figure import check_suffix, draw_source, save_figure
from bncli.cli.plots.rows import (
    MAX_PIXELS,
    draw_column,
    figure_size,
    label_rows,
    make_column,
    row_name,
    row_notes,
)
from bncli.errors import BncliError
from bncli.wording import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bncli.batchnorm import Comparison

SHORT = {
    "statistics_moved_weights_unchanged": "weights unchanged",
    "weights_moved_statistics_unchanged": "statistics unchanged",
}


def plot_comparison(comparison: Comparison, path: Path, *, first: str, second: str) -> None:
    """Draw mean shift, variance ratio and KL divergence of every channel.

    `first` and `second` name the files. The suffix of `path` selects PNG or SVG.
    The same comparison gives the same bytes.

    Raises BncliError for no layers, another suffix, or a path that cannot be written.
    """
    check_suffix(path)
    layers = comparison.layers
    if not layers:
        raise BncliError(f"{path}: nothing to draw: no BatchNorm layer is in both with the same channels")
    found = [layer.divergence for layer in layers]
    columns = [
        make_column("mean shift", "standard deviations of the first",
                    [None if x is None else x.mean_shift_in_first_deviations for x in found], neutral=0.0),
        make_column("variance ratio", "(running_var + eps),\nsecond over first, log scale",
                    [None if x is None else x.var_ratio for x in found], log=True, neutral=1.0),
        make_column("KL divergence", "of the second from the first,\nlog scale",
                    [None if x is None else x.kl for x in found], log=True),
    ]  # fmt: skip
    flags = [tuple(SHORT[flag] for flag in layer.flags) for layer in layers]
    notes = row_notes(columns, flags)
    names = [
        row_name(layer.name, 0 if x is None else len(x.kl)) for layer, x in zip(layers, found, strict=True)
    ]
    width, height = figure_size(columns, names, notes)
    height += 0.25  # for the names of the files

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained", wspace=0.03, rect=(0, 0.25 / height, 1, 1 - 0.25 / height))
        figure.suptitle(
            f"How far {plural(len(layers), 'BatchNorm layer')} moved", fontsize=12, fontweight="bold"
        )
        axes = figure.subplots(1, len(columns), sharey=True)
        for axis, column in zip(axes, columns, strict=True):
            draw_column(axis, column, flags)
        label_rows(axes[0], axes[-1], names, flags, notes)
        draw_source(figure, f"from {shorten(first, 70)} to {shorten(second, 70)}", at=0.06 / height)

    save_figure(path, (width, height), draw, dpi=min(150, MAX_PIXELS / height))
