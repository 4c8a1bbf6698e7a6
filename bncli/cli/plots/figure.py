"""A figure into a PNG or SVG file, so that the same data give the same bytes on every machine alike."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.result_file import result_file
from bncli.errors import BncliError

if TYPE_CHECKING:  # drawing is rare: the command line starts without matplotlib
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")

GRID, NOTE = "#dde3ea", "#5b6670"


def check_suffix(path: Path) -> None:
    """Raise BncliError for a path that ends neither in .png nor in .svg."""
    if path.suffix.lower() not in SUFFIXES:
        raise BncliError(f"{path}: cannot draw {path.suffix or 'a file without suffix'}: use .png or .svg")


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
    with matplotlib.style.context(["default", style]):
        figure = Figure(figsize=size, dpi=dpi)
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == ".svg" else {"Software": None}
        figure.savefig(buffer, format=kind[1:], metadata=metadata)
    return buffer.getvalue()
