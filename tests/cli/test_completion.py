"""What the shell offers after Tab, asked for as the scripts of bash, zsh and fish ask."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Bncli


def bash(bncli: Bncli, monkeypatch: pytest.MonkeyPatch, words: str) -> list[str]:
    """The candidates for the last word, which may be empty."""
    monkeypatch.setenv("_BNCLI_COMPLETE", "complete_bash")
    monkeypatch.setenv("COLUMNS", "80")  # which the program changes
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    outcome = bncli()
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("bncli rec", ["recalibrate"]),
        ("bncli bench ", ["train", "eval"]),
        ("bncli eval --batch", ["--batch-sizes", "--batch-invariant"]),
        ("bncli bench eval --r", ["--rounds"]),
        ("bncli train s", ["speedrun"]),
        ("bncli bench train cif", ["cifar10"]),
        ("bncli config q", ["quickstart"]),
        ("bncli train my", ["my.yaml"]),
        ("bncli train ./m", ["./my.yaml"]),
        ("bncli explain batch-", ["batch-size-1", "batch-invariance"]),
        ("bncli explain dead", ["dead_channel"]),
        ("bncli inspect-stats --select BN001,dead", ["BN001,dead_channel"]),
        ("bncli inspect-stats --explain BN001", ["BN001"]),
        ("bncli inspect-stats --fail-on ", ["error", "warning", "never"]),
        ("bncli recalibrate x.pt --method ", ["exact", "precise", "debias"]),
        ("bncli eval x.pt --device c", ["cpu", "cuda"]),
        ("bncli eval x.pt --tta ", ["flip", "shifts"]),
        # nothing of ours: the shell offers files
        ("bncli eval ", []),
        ("bncli train folder", []),
    ],
)
def test_bash_is_offered(
    bncli: Bncli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").touch()
    (tmp_path / "folder").mkdir()
    assert bash(bncli, monkeypatch, words) == expected


def test_every_command_and_every_option_is_offered(bncli: Bncli, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.cli.test_help_pages import pages

    for words, command in list(pages()):
        names = bash(bncli, monkeypatch, " ".join(["bncli", *words, ""]))
        if hasattr(command, "commands"):
            assert names == list(command.commands)
        offered = bash(bncli, monkeypatch, " ".join(["bncli", *words, "--"]))
        given = [param for param in command.params if param.param_type_name == "option"]
        options = {name for param in given for name in (param.opts[-1], *param.secondary_opts)}
        assert set(offered) == options | {"--help"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_zsh_and_fish_are_offered_each_on_one_line_with_its_meaning(
    bncli: Bncli, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("_BNCLI_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    monkeypatch.setenv("COLUMNS", "40")
    for words, first in (("bncli recalibrate --m", "--m"), ("bncli explain tr", "train-and-eval")):
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", words)
        outcome = bncli()
        assert (outcome.code, outcome.err) == (0, "")
        lines = outcome.out.strip().splitlines()
        assert all(first in line or "track-running-stats" in line for line in lines)
        assert max(map(len, lines)) > 60  # with the meaning, which was not wrapped


def test_bash_itself_completes_once_it_has_read_the_script(tmp_path: Path) -> None:
    program = tmp_path / "bncli"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bncli "$@"\n')
    program.chmod(0o755)
    script = """
        source <(_BNCLI_COMPLETE=source_bash bncli)
        COMP_WORDS=(bncli inspect-stats --all --ig); COMP_CWORD=3
        $(complete -p bncli | sed 's/.*-F \\([^ ]*\\) .*/\\1/') bncli
        echo "${COMPREPLY[@]}"
    """
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PATH": path, "PYTHONPATH": root}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("--ignore\n", "")


def test_it_is_installed_by_an_option(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": root}
    # a shell above, which Typer looks for
    command = f'"{sys.executable}" -m bncli --install-completion; exit $?'
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True, env=environment
    )
    assert "bash completion installed in" in done.stdout
    assert "bncli" in (tmp_path / ".bashrc").read_text()


def test_completion_imports_no_torch(tmp_path: Path) -> None:
    words = ["bncli explain ", "bncli train ", "bncli eval --d", "bncli inspect-stats --select ", "bncli "]
    code = (
        "import os, sys; from bncli.cli.app import main\n"
        f"for words in {words!r}:\n"
        "    os.environ.update(COMP_WORDS=words, COMP_CWORD=str(words.count(' ')))\n"
        "    assert main([]) == 0\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    environment = os.environ | {"_BNCLI_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
    assert len(done.stdout.split()) > 40
