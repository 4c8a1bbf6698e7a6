"""Tables with a row for each layer, whatever the layers are called.

A name that leaves the numbers no room stands on a line of its own above them, so that it can be copied whole.
Only one that is longer than the line is broken, after a dot if there is one.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from rich.cells import cell_len, set_cell_size
from rich.console import Console

from bncli.cli.messages import one_line

GAP = 2  # columns between two columns
MIN_NAME = len("layer")


def show_layer_table(
    console: Console,
    names: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    styles: Sequence[str | None] | None = None,
) -> None:
    """Print a row for each name; `columns` has the cells of each header, which may be of two lines.

    `styles` has one for each row.
    """
    names = [one_line(name) for name in names]
    widths = column_widths(columns)
    room = max(console.width - sum(width + GAP for width in widths), MIN_NAME)
    in_row = [cell_len(name) for name in names if cell_len(name) <= room]
    widths = [max([MIN_NAME, *in_row]), *widths]
    headers = zip_longest(*(name.split("\n") for name in ("layer", *columns)), fillvalue="")
    for header in headers:
        console.print(_row(header, widths), style="bold", soft_wrap=True)
    line = "-" if console.options.ascii_only else "─"
    console.print(line * min(sum(widths) + GAP * len(columns), console.width), soft_wrap=True)
    for name, style, *cells in zip(names, styles or [None] * len(names), *columns.values(), strict=True):
        shown = name
        if cell_len(name) > widths[0]:
            console.print("\n".join(fold_name(name, console.width)), style=style, soft_wrap=True)
            shown = ""
        console.print(_row((shown, *map(str, cells)), widths), style=style, soft_wrap=True)


def column_widths(columns: Mapping[str, Sequence[str]]) -> list[int]:
    """Of each column, without the gap before it."""
    return [max(map(len, [*header.split("\n"), *cells])) for header, cells in columns.items()]


def fold_name(name: str, width: int) -> list[str]:
    """Lines of at most `width` columns, broken after dots if possible; put together they are the name."""
    lines = [""]
    for part in name.replace(".", ".\0").split("\0"):
        if cell_len(lines[-1] + part) > width and lines[-1]:
            lines.append("")
        for letter in part:  # a part that is itself too long is broken anywhere
            if cell_len(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    name = set_cell_size(cells[0], widths[0])
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return (" " * GAP).join([name, *numbers]).rstrip()
