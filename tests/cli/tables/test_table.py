from itertools import pairwise

import pytest
from rich.console import Console

from bncli.cli.tables.table import aligned, console_for_results, print_wrapped

TEXT = "The running statistics are those of another network: 0.072 of (0, 1) is left after 25 updates. " * 3


@pytest.mark.parametrize("width", [20, 40, 79, 80, 200])
@pytest.mark.parametrize("indent", [0, 4, 30])
def test_a_paragraph_has_whole_words_on_lines_that_fit(
    capsys: pytest.CaptureFixture[str], width: int, indent: int
) -> None:
    print_wrapped(Console(width=width), TEXT, indent=indent)
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    room = max(min(width, 80), indent + 10)
    assert " ".join(lines).split() == TEXT.split()
    for line, following in pairwise(lines):
        assert line.startswith(" " * indent)
        assert len(line) <= room < len(f"{line} {following.split()[0]}")  # no word more would have fitted


def test_a_mark_stands_before_the_first_line_alone(capsys: pytest.CaptureFixture[str]) -> None:
    print_wrapped(Console(width=80), TEXT, mark="- ")
    first, *others = capsys.readouterr().out.rstrip("\n").split("\n")
    assert first.startswith("- The")
    assert all(line.startswith("  ") and line[2] != " " for line in others)


def test_what_a_terminal_would_obey_is_made_visible(capsys: pytest.CaptureFixture[str]) -> None:
    print_wrapped(console_for_results(), "one\x1b[31m two\nthree")
    assert capsys.readouterr().out == "one\\x1b[31m two three\n"


def test_names_are_printed_letter_by_letter(capsys: pytest.CaptureFixture[str]) -> None:
    console_for_results().print(":dog: [bold]layer[/bold]")
    assert capsys.readouterr().out == ":dog: [bold]layer[/bold]\n"


def test_numbers_of_one_column_are_aligned_among_themselves() -> None:
    assert aligned([["1", "2.5"], ["-10", "3"]]) == ["  1 2.5", "-10   3"]
    assert aligned([["1", "22"]], gap=2) == ["1  22"]
    assert aligned([]) == []
