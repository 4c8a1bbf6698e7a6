"""The README is tested: its commands exist and its Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from bncli.batchnorm import RULES
from bncli.cli.app import app
from bncli.config import Cifar10Config, Config, ImageFolderConfig, SyntheticConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    shell = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    typed = [line[2:] for block in blocks("console") for line in block.splitlines() if line[:2] == "$ "]
    return [line.strip().split("  #")[0] for line in shell + typed if line.strip().startswith("bncli ")]


@pytest.mark.parametrize("line", shell_lines())
def test_every_command_in_the_readme_is_registered_with_its_options(line: str) -> None:
    words = [word.removeprefix(".venv/bin/") for word in shlex.split(line)][1:]
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no such command: {words[0]}"
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help", "--version"}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"no such option: {word}"


def test_every_registered_command_is_in_the_readme() -> None:
    for name in typer.main.get_command(app).commands:
        assert f"bncli {name}" in README


@pytest.mark.parametrize("target", re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE))
def test_every_make_target_in_the_readme_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_library_example_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 12
    config = ROOT / "configs" / "quickstart.yaml"
    code = code.replace(
        '"configs/quickstart.yaml", [', f'{str(config)!r}, ["data.num_train=500", "data.num_test=100", '
    )
    assert str(config) in code
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(code, namespace)
    assert namespace["result"].accuracy > 0.1


def test_the_readme_names_no_path_of_a_machine() -> None:
    assert not re.search(r"/(work|home|root)/", README)


def keys_of(section: type[BaseModel], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys_of(field.annotation, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field.default
    return found


@pytest.mark.parametrize("data", [SyntheticConfig, Cifar10Config, ImageFolderConfig])
def test_the_table_of_keys_is_complete_and_gives_the_defaults(data: type[BaseModel]) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in README.splitlines() if "| `" in line]
    table: dict[str, str] = {}
    for keys, defaults in rows:
        names = re.findall(r"`([a-z_0-9.]+)`", keys)
        values = [defaults] if len(names) == 1 else defaults.split(", ")
        table |= dict(zip(names, values * (len(names) // len(values)), strict=True)) if "." in keys else {}
    expected = keys_of(Config) | keys_of(data, "data.")
    del expected["data"], expected["data.name"]
    for key, default in expected.items():
        words = {"None": "null", "True": "true", "False": "false"}
        text = str(list(default)) if isinstance(default, tuple) else str(default)
        text = words.get(text, text)
        assert table[key].strip("`") == text, key


def rules_table() -> str:
    """The README's list of rules, made from the table that findings and --explain are made from."""
    lines = ["| code | rule | severity | finds | thresholds |", "|---|---|---|---|---|"]
    for rule in RULES:
        limits = ", ".join(f"`{limit.name}={limit.default:.6g}`" for limit in rule.thresholds)
        summary = rule.summary.replace("|", "\\|")
        lines.append(f"| {rule.code} | `{rule.name}` | {rule.severity} | {summary} | {limits} |")
    return "\n".join(lines) + "\n"


def test_the_list_of_rules_is_the_table_in_the_code() -> None:
    assert rules_table() in README, f"put this into the README:\n{rules_table()}"
