"""Every help page as it is read: at 80 columns, in groups, nothing cut, with examples that work."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

from bncli.cli.app import app
from bncli.cli.help_page import GROUPS, OTHER
from tests.conftest import Bncli

PROGRAM = typer.main.get_command(app)
# take a minute, or need data that are not here
LONG = ("bncli demo", "bncli bench", "bncli train", "bncli report runs/first --measure")
NEED_CIFAR10 = ("bncli train cifar10", "bncli doctor --data-root")


def pages(command: Any = PROGRAM, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The words of every command, and click's object."""
    yield words, command
    for name, child in getattr(command, "commands", {}).items():
        yield from pages(child, (*words, name))


PAGES = [pytest.param(words, command, id=" ".join(words) or "bncli") for words, command in pages()]
COMMANDS = [page for page in PAGES if not hasattr(page.values[1], "commands")]


def examples_of(command: Any) -> list[str]:
    return (command.epilog or "").splitlines()


EXAMPLES = [(example, command) for _, command in pages() for example in examples_of(command)]


@pytest.mark.parametrize(("words", "command"), PAGES)
@pytest.mark.parametrize("width", [80, 60])
def test_a_page_is_neither_cut_nor_wider_than_the_terminal(
    bncli: Bncli, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], command: Any, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    outcome = bncli(*words, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    examples = {f"  {example}" for example in examples_of(command)}  # never wrapped: they are copied
    for line in outcome.out.splitlines():
        assert len(line) <= (80 if line in examples else width), line
        assert line == line.rstrip()
    assert "…" not in outcome.out
    assert "[[" not in outcome.out
    assert "x>=" not in outcome.out
    assert "<=x" not in outcome.out
    # what Typer cuts ends in three dots, as only these may
    for word in re.findall(r"\S*\.\.\.\S*", outcome.out):
        arguments = {"[ARGS]...", "IMAGE...", "SOURCE...", "CHECKPOINT...", "[CHECKPOINT...]"}
        assert word in arguments | {"N,N,...", "W,W,..."}, word


@pytest.mark.parametrize(("words", "command"), PAGES)
@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}])
def test_a_page_is_plain_text_everywhere(
    bncli: Bncli,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    command: Any,
    environment: dict[str, str],
) -> None:
    plain = bncli(*words, "--help").out
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert bncli(*words, "--help").out == plain
    assert all(char.isprintable() or char == "\n" for char in plain)


def test_the_list_of_commands_has_each_summary_on_one_line(
    bncli: Bncli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for words, command in pages():
        for name, child in getattr(command, "commands", {}).items():
            sentence = " ".join(child.help.split("\n\n")[0].split()).removesuffix(".")
            lines = bncli(*words, "--help").out.splitlines()
            assert any(re.fullmatch(rf"  {name} +{re.escape(sentence)}", line) for line in lines), name


@pytest.mark.parametrize(("words", "command"), COMMANDS)
def test_every_option_is_in_a_group_and_the_groups_come_in_one_order(
    bncli: Bncli, words: tuple[str, ...], command: Any
) -> None:
    for param in command.params:
        known = param.param_type_name == "argument" or param.rich_help_panel in GROUPS[1:-1]
        assert known, f"{param.opts[0]}: give it a rich_help_panel of bncli/cli/help_page.py"
    out = bncli(*words, "--help").out
    headings = [line.removesuffix(":") for line in out.splitlines() if re.fullmatch(r"\S.*:", line)]
    assert headings == [*(group for group in GROUPS if group in headings), "Examples"]
    # each below its own heading
    for param in command.params:
        group = "Arguments" if param.param_type_name == "argument" else param.rich_help_panel
        section = out.split(f"\n{group}:\n")[1].split("\n\n")[0]
        name = param.metavar if param.param_type_name == "argument" else param.opts[-1]
        assert re.search(rf"^  (-\w, )?{re.escape(name)}( |$)", section, flags=re.MULTILINE), name
    assert out.split(f"\n{OTHER}:\n")[1].lstrip().startswith("-h, --help")


@pytest.mark.parametrize(("words", "command"), COMMANDS)
def test_values_have_readable_names_and_defaults_are_shown(
    bncli: Bncli, words: tuple[str, ...], command: Any
) -> None:
    out = " ".join(bncli(*words, "--help").out.split())
    for param in command.params:
        takes_a_value = param.param_type_name == "argument" or not param.is_flag
        assert not takes_a_value or re.fullmatch(r"[A-Z][A-Z,=.]*(\.\.\.)?|[A-Z]+_DIR", param.metavar or "")
        assert param.help, param.name
        if param.default not in (None, False):
            assert f"default: {param.default}" in out, param.name


@pytest.mark.parametrize(("words", "command"), PAGES)
def test_every_page_has_examples_of_its_own_command(
    bncli: Bncli, words: tuple[str, ...], command: Any
) -> None:
    found = examples_of(command)
    assert 2 <= len(found) <= 4
    assert bncli(*words, "--help").out.endswith("\n\nExamples:\n  " + "\n  ".join(found) + "\n")
    assert all(example.startswith(" ".join(["bncli", *words])) for example in found)


@pytest.mark.parametrize(("example", "command"), EXAMPLES)
def test_every_example_can_be_parsed(example: str, command: Any) -> None:
    program, *arguments = shlex.split(example)
    assert program == "bncli"
    found = PROGRAM
    while hasattr(found, "commands"):
        found = found.commands[arguments.pop(0)]
    found.make_context(example, arguments)  # raises where click refuses a word


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the examples speak of."""
    run = shutil.copytree(finished_run, tmp_path / "runs" / "first")
    for epoch in (1, 2):
        shutil.copy(run / "last.pt", run / f"epoch-000{epoch}.pt")
    (tmp_path / "images").mkdir()
    for name in ("photo.png", "images/one.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / "pics" / split / name).mkdir(parents=True)
            for index in range(3):
                color = (80 * number, 60 * index, 90)
                Image.new("RGB", (40, 30), color).save(tmp_path / "pics" / split / name / f"{index}.png")
    (tmp_path / "net.py").write_text(NET)
    namespace: dict[str, Any] = {}
    exec(NET, namespace)
    for name in ("a.pt", "b.pt"):
        torch.save(namespace["Net"]().state_dict(), tmp_path / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, stride=8), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
"""
CHEAP = sorted({example for example, _ in EXAMPLES if not example.startswith((*LONG, *NEED_CIFAR10))})


@pytest.mark.parametrize("example", CHEAP)
def test_examples_work_as_printed(bncli: Bncli, folder: Path, example: str) -> None:
    outcome = bncli(*shlex.split(example)[1:])
    assert outcome.code in {0, 1}, outcome.err
    assert outcome.out or "-o" in example


@pytest.mark.slow
@pytest.mark.parametrize(
    "example",
    sorted({one for one, _ in EXAMPLES if one.startswith(LONG) and not one.startswith(NEED_CIFAR10)}),
)
def test_long_examples_work_as_printed(bncli: Bncli, folder: Path, example: str) -> None:
    if "--run-dir runs/first" in example:
        shutil.rmtree("runs/first")
    outcome = bncli(*shlex.split(example)[1:])
    assert outcome.code == 0, outcome.err


def test_pages_import_neither_torch_nor_rich() -> None:
    code = (
        "import sys; from bncli.cli.app import main;"
        " codes = [main([*words, '--help']) for words in ([], ['eval'], ['inspect-stats'], ['bench'])];"
        " sys.exit(any(codes) or 'torch' in sys.modules or 'rich' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
