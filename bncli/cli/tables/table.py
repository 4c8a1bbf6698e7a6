"""How results look: tables for people, JSON for scripts. Each kind of result has its own render_*.py.

The numbers come from the library; here they are only laid out.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Table

from bncli.cli.messages import MAX_WIDTH, one_line, wrapped
from bncli.serialization import to_json
from bncli.wording import plural


def print_json(result: Any) -> None:
    """One JSON document on stdout."""
    print(to_json(result, in_lines=True))


class _Console(Console):
    """A console whose reader may leave early: rich would end the program with 1, our answer "no"."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console_for_results() -> Console:
    """Stdout: as wide as its terminal; elsewhere as COLUMNS says or 80 columns, and without colours."""
    # rich would take the width of a terminal that stdin or stderr is
    width = None if sys.stdout.isatty() else _width_of_files()
    return _Console(highlight=False, markup=False, emoji=False, width=width)


def _width_of_files() -> int:
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) > 0 else MAX_WIDTH


class _Table(Table):
    """A table whose lines end where their text ends: rich fills them up with blanks."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in Segment.split_lines(
            cast("Iterable[Segment]", super().__rich_console__(console, options))
        ):
            while line and not line[-1].text.strip(" "):
                line.pop()
            if line:
                text, style, control = line.pop()
                line.append(Segment(text.rstrip(" "), style, control))
            yield from line
            yield Segment.line()


def table_of(title: str | None, *headers: str, left: int = 1) -> Table:
    """A table whose first `left` columns are text and whose other columns are numbers."""
    table = _Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.pad_edge, table.show_edge = False, False
    for index, header in enumerate(headers):
        is_text = index < left
        table.add_column(header, justify="left" if is_text else "right", overflow="fold")
    return table


def print_wrapped(
    console: Console, text: str, *, mark: str = "", indent: int = 0, style: str | None = None
) -> None:
    """One paragraph, indented by spaces, or behind a mark: whole words on lines that fit the terminal.

    Off a terminal it is 80 columns wide too: people read what they redirect.
    """
    lines = wrapped(text, min(console.width, MAX_WIDTH), first=mark or " " * indent)
    console.print("\n".join(lines), style=style, soft_wrap=True)


def aligned(rows: Sequence[Sequence[str]], *, gap: int = 1) -> list[str]:
    """Several numbers in one column, aligned among themselves: narrower than several columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (" " * gap).join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows
    ]


def number(value: float | None) -> str:
    """Two significant digits, which is what a table of statistics has room for."""
    return "-" if value is None else f"{value:.2g}"


def runtime_line(runtime: dict[str, Any]) -> str:
    """`Runtime.describe()` or `Runtime.describe_training()` as text."""
    compiled = ", compiled" if runtime.get("compile") else ""
    threads = plural(runtime["threads"], "thread")
    if "processes" in runtime:
        threads = f"{plural(runtime['processes'], 'process', 'processes')} of {threads}"
    return "{device}, {precision}, {memory_format}, ".format(**runtime) + threads + compiled


def machine_line(machine: dict[str, Any]) -> str:
    """`describe_machine()` as text."""
    cpus = plural(machine["num_cpus"], "CPU")
    gpu = machine.get("gpu", "no GPU")
    return f"{machine['cpu']}, {cpus}, {gpu}; torch {machine['torch']}, Python {machine['python']}"


def show_lines(console: Console, lines: dict[str, str]) -> None:
    """Names and values in two columns."""
    grid = _Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in lines.items():
        grid.add_row(key, one_line(value))
    console.print(grid)
