"""What goes to stderr: one line each, with nothing in it that a terminal would obey."""

import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bncli.runtime import Runtime


def one_line(text: str) -> str:
    """The text without line breaks and with control characters made visible.

    File and layer names come from strangers; an escape sequence in them must not reach the terminal.
    """
    flat = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in flat)


def shorten(text: str, length: int) -> str:
    """The text on one line of at most `length` letters; of a longer one the end, which tells names apart."""
    text = one_line(text)
    return text if len(text) <= length else f"…{text[1 - length :]}"


def wrapped(text: str, width: int, *, first: str = "") -> list[str]:
    """Lines of at most `width` columns; the second and later ones are indented as far as `first` is long."""
    indent = " " * len(first)
    width = max(width, len(first) + 10)  # a word a line, where there is hardly any room
    return textwrap.wrap(
        one_line(text), width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False
    )


def print_error(message: str) -> None:
    """Say on stderr why the command ends."""
    print(f"bncli: error: {one_line(message)}", file=sys.stderr)


def note_emulation(runtime: "Runtime") -> None:
    """Say that bfloat16 was asked for where it does not pay: a wait without a visible reason."""
    if runtime.emulates_bfloat16:
        print_note(
            f"warning: runtime.precision: bfloat16 is emulated or unknown on {runtime.device}, where it may"
            " take many times as long as float32; set it to auto or float32"
        )


def print_note(message: str) -> None:
    """Say something on stderr that is no result."""
    print(f"bncli: {one_line(message)}", file=sys.stderr)
