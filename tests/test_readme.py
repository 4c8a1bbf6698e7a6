"""The README is tested by doing what it says."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

from bncli.cli.app import app
from tests import a_strangers_resnet
from tests.conftest import Bncli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / ".readme").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
LONGEST_LINE = 120
BUSY = "bncli: other processes"  # a machine that does other work

SMALL = ["--set", "data.num_train=300", "--set", "data.num_test=80", "--set", "train.epochs=1"]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def tour() -> Iterator[tuple[str, str]]:
    """Each command after a dollar sign, with what the README says that it prints."""
    for block in blocks("console"):
        for part in block.split("$ ")[1:]:
            command, _, printed = part.partition("\n")
            yield command, printed


def shell_lines(text: str) -> list[str]:
    shell = [line for block in blocks("sh", text) for line in block.replace("\\\n", " ").splitlines()]
    typed = [line[2:] for block in blocks("console", text) for line in block.splitlines() if line[:2] == "$ "]
    table = re.findall(r"^\| `(bncli [^`]*)`", text, flags=re.MULTILINE)
    return [
        line.strip().split("  #")[0] for line in shell + typed + table if line.strip().startswith("bncli ")
    ]


def test_the_tour_runs_on_small_data(bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a_strangers_resnet.write(tmp_path / "model.pt")
    commands = [shlex.split(command) for command, _ in tour()]
    assert [words[1] for words in commands] == ["train", "eval", "inspect-stats", "inspect-stats"]
    for words in commands:
        outcome = bncli(*words[1:], *(SMALL if words[1] == "train" else []))
        assert outcome.code in {0, 1}, outcome.err


def words_of(text: str) -> list[str]:
    """Its lines without numbers: what a second machine must print as well."""
    return [
        " ".join(line.split()) for line in text.splitlines() if line.strip() and not re.search(r"\d", line)
    ]


@pytest.mark.slow
def test_the_tour_as_typed_prints_what_the_readme_says(tmp_path: Path) -> None:
    a_strangers_resnet.write(tmp_path / "model.pt")
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    environment["PYTHONPATH"] = str(ROOT)
    for command, printed in tour():
        words = [sys.executable, "-m", *shlex.split(command)]
        # of training all is shown; elsewhere progress is, and only where the machine is slow
        errors = subprocess.STDOUT if words[3] == "train" else subprocess.PIPE
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
        )
        assert done.returncode == ("(error)" in done.stdout), done.stderr
        lines = [line for line in done.stdout.splitlines() if not line.startswith(BUSY)]
        assert words_of("\n".join(lines)) == words_of(printed), command
        assert len(lines) == len(printed.splitlines()), command


def test_what_the_readme_prints_fits_a_terminal() -> None:
    for command, printed in tour():
        for line in [f"$ {command}", *printed.splitlines()]:
            assert len(line) <= 80, line
            assert line == line.rstrip()


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in shell_lines(page.read_text())}))
def test_every_command_is_registered_with_its_options(line: str) -> None:
    words = shlex.split(line)[1:]
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no such command: {words[0]}"
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help", "--version"}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"no such option: {word}"


def test_every_registered_command_is_in_the_readme() -> None:
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"| `bncli {name}" in README, name


@pytest.mark.parametrize("target", re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE))
def test_every_make_target_in_the_readme_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_python_examples_do_what_the_readme_says() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    images = torch.randn(40, 3, 8, 8) + 1.0
    for _ in range(60):
        model(images)
    nn.init.constant_(model[1].running_var, -1.0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=10)
    namespace = {"model": model, "images": images, "loader": loader}
    (example,) = blocks("python")
    imported, audit, recalibrate, certify = example.strip().split("\n\n")
    for code in (audit, recalibrate, certify):
        assert len(code.splitlines()) <= 3
    run(imported, namespace)

    assert run(audit, namespace).splitlines()[0].startswith("error BN004 1 ")
    assert run(recalibrate, namespace) == "40 images, 1 layers\n"
    with torch.no_grad():
        outputs = model[0](images)
    torch.testing.assert_close(model[1].running_mean, outputs.mean(dim=(0, 2, 3)))
    assert run(certify, namespace).startswith("True ")
    assert run(audit, namespace) == ""


def run(code: str, namespace: dict[str, object]) -> str:
    printed: list[str] = []
    namespace["print"] = lambda *values: printed.append(" ".join(map(str, values)) + "\n")
    exec(code, namespace)
    return "".join(printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)]*)?)\)", text):
        name, _, anchor = target.partition("#")
        if name.startswith("http"):
            continue
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_a_path_of_a_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w.])/(work|home|root|tmp)/", page.read_text(encoding="utf-8"))


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 260
    assert max(len(line) for line in lines if not line.startswith(("|", "!["))) <= LONGEST_LINE
