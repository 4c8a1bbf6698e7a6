"""The page of JSON keys is what the commands print."""

from pathlib import Path

import pytest
import typer

from bncli.cli.app import app
from tests.json_keys import COMMANDS, key_lines, page

PAGE = Path(__file__).parent.parent / ".readme" / "json.md"


@pytest.mark.slow
def test_the_page_of_keys_is_what_the_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert PAGE.read_text(encoding="utf-8") == page(tmp_path), "write it again: python -m tests.json_keys"


def test_every_command_that_prints_json_is_on_the_page() -> None:
    on_the_page = {command.split()[0] for _, command in COMMANDS}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        has_json = any("--json" in parameter.opts for parameter in command.params)
        assert name in on_the_page or not has_json, name


def test_keys_of_objects_stand_under_their_own() -> None:
    inner = {"p": None}, {"p": {"q": 1}}
    document = {"a": 1, "b": {"x": 1, "y": {"z": 2}}, "c": list(inner), "d": {"x": 0, "y": {"z": 1}}}
    assert key_lines(document) == [
        "a, b, c, d",
        "  b, d: x, y",
        "    y: z",
        "  c[]: p",
        "    p: q",
    ]
