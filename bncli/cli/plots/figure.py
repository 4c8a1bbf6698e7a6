"""A figure into a PNG or SVG file, so that the same data give the same bytes on every machine alike."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bncli.cli.messages import one_line, shorten
from bncli.cli.result_file import result_file
from bncli.errors import BncliError

if TYPE_CHECKING:  # drawing is rare: the command line starts without matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")

GRID, NOTE = "#dde3ea", "#5b6670"
ROUNDED_LETTERS = 1.05  # each letter of a PNG is as wide as whole pixels
SOURCE_LEFT, SOURCE_SIZE = 0.012, 7.5  # a fraction of the width; points


def check_suffix(path: Path) -> None:
    """Raise BncliError for a path that ends neither in .png nor in .svg."""
    if path.suffix.lower() not in SUFFIXES:
        raise BncliError(f"{path}: cannot draw {path.suffix or 'a file without suffix'}: use .png or .svg")


def text_width(texts: Sequence[str], size: float) -> float:
    """Inches that the widest line of these texts takes in letters of `size` points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family="DejaVu Sans", size=size)  # ships with matplotlib
    lines = {line for text in texts for line in text.splitlines() if line}
    with _without_warnings():
        widths = [text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] for line in lines]
    return ROUNDED_LETTERS * max(widths, default=0.0) / 72


def clear_frame(axis: Axes, *, grid: Literal["x", "y", "both"] | None) -> None:
    """Without frame and tick marks; with a thin grid behind the data instead."""
    if grid is not None:
        axis.grid(axis=grid, color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def draw_source(figure: Figure, source: str, *, at: float) -> None:
    """What was drawn, in the lower left corner at that height (a fraction); too long, only its end."""
    room = figure.get_figwidth() * (1 - 2 * SOURCE_LEFT)
    text = one_line(source)
    while len(text) > 1 and text_width([text], SOURCE_SIZE) > room:
        text = shorten(text, len(text) - 1)
    figure.text(SOURCE_LEFT, at, text, color=NOTE, fontsize=SOURCE_SIZE)


def save_figure(
    path: Path, size: tuple[float, float], draw: Callable[[Figure], None], *, dpi: float = 150
) -> None:
    """Let `draw` fill a figure of `size` inches, and write it in the format that the suffix selects.

    Raises BncliError for another suffix, or a path that cannot be written.
    """
    check_suffix(path)
    with result_file(path, "the plot") as file:
        file.write(_render(path.suffix.lower(), size, draw, dpi))


def _render(kind: str, size: tuple[float, float], draw: Callable[[Figure], None], dpi: float) -> bytes:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # the user's matplotlibrc must not change the picture; the salt fixes the ids inside an SVG
    style = {"svg.hashsalt": "bncli", "font.size": 9, "text.parse_math": False}
    with matplotlib.style.context(["default", style]), _without_warnings():
        figure = Figure(figsize=size, dpi=dpi)
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == ".svg" else {"Software": None}
        figure.savefig(buffer, format=kind[1:], metadata=metadata)
    return buffer.getvalue()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Names come from strangers: a letter that the font lacks becomes a box, not a message on stderr."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
