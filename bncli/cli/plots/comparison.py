"""Two checkpoints as one figure: a row per layer, how far each of its channels moved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.messages import one_line
from bncli.cli.plots.figure import NOTE, check_suffix, save_figure
from bncli.cli.plots.rows import (
    MARGINS,
    MAX_PIXELS,
    NOTES_WIDTH,
    ROW_HEIGHT,
    WIDTH,
    draw_column,
    label_rows,
    make_column,
    row_name,
    row_notes,
)
from bncli.errors import BncliError

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
        make_column("mean shift", "standard deviations of the first", False,
                    [None if x is None else x.mean_shift_in_first_deviations for x in found]),
        make_column("variance ratio", "(running_var + eps), second over first, log scale", True,
                    [None if x is None else x.var_ratio for x in found]),
        make_column("KL divergence", "nats, of the second from the first, log scale", True,
                    [None if x is None else x.kl for x in found]),
    ]  # fmt: skip
    flags = [tuple(SHORT[flag] for flag in layer.flags) for layer in layers]
    notes = row_notes(columns, flags)
    width = WIDTH + (NOTES_WIDTH if any(notes) else 0.0)
    height = MARGINS + 0.25 + ROW_HEIGHT * len(layers)
    count = f"{len(layers):,} BatchNorm layer" + ("" if len(layers) == 1 else "s")

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained", wspace=0.03, rect=(0, 0.25 / height, 1, 1 - 0.25 / height))
        figure.suptitle(f"How far {count} moved", fontsize=12, fontweight="bold")
        axes = figure.subplots(1, len(columns), sharey=True)
        for axis, column, neutral in zip(axes, columns, (0.0, 1.0, None), strict=True):
            draw_column(axis, column, flags, neutral=neutral)
        names = [
            row_name(layer.name, 0 if x is None else len(x.kl))
            for layer, x in zip(layers, found, strict=True)
        ]
        label_rows(axes[0], axes[-1], names, flags, notes)
        source = f"from {one_line(first)[-70:]} to {one_line(second)[-70:]}"
        figure.text(0.012, 0.06 / height, source, color=NOTE, fontsize=7.5)

    save_figure(path, (width, height), draw, dpi=min(150, MAX_PIXELS / height))
