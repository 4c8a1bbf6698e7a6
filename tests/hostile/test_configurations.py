"""YAML made to harm: tags, aliases, nesting, numbers of thousands of digits, pipes."""

import os
from pathlib import Path

import pytest

from tests.conftest import Bncli

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"x: !!python/object/apply:os.system [touch was-here]", "the tag"),
        (b"x: !!binary aGk=", "the tag tag:yaml.org,2002:binary; remove it (line 1"),
        (b"x: ! 3", "the tag"),
        (LAUGHS.encode(), "the alias *a; write the value out (line 2"),
        (b"a: &a {epochs: 3}\ntrain: {<<: *a}", "the alias *a"),
        (b"x: " + b"[" * 100_000, "nested deeper than 20 levels"),
        (b"x: " + b"9" * 5000, "5,000 characters; at most 4,096"),
        (b"train: {epochs: 0x" + b"f" * 4000 + b"}", "a number of thousands of digits"),
        (b"x: " + b"1:1" * 2000, "at most 4,096"),
        (b"#" * (1 << 20) + b"\n", "larger than 1,048,576 bytes"),
        (b"train: {epochs: 1}\0", "no valid YAML"),
        (b"train: {epochs: \xff}", "no YAML text"),
        ("train: {epochs: 1}".encode("utf-16"), "no YAML text"),
        (b"x: 2001-99-99", "no valid YAML"),
        (b"? [1, 2]\n: 3", "no valid YAML"),
        (b"{1: 2}", "1: "),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_hostile_configuration_is_named_in_one_line(
    bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_bytes(content)
    outcome = bncli("train", "config.yaml", "--dry-run")
    assert outcome.code == 2
    assert expected in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert len(outcome.err) < 500
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize(
    "value",
    ["!!python/name:os.system", "[" * 5000, "9" * 5000, "*a", "&a [*a]", "\0", "\udcff", "2001-99-99"],
)
def test_a_hostile_override_is_named_in_one_line(bncli: Bncli, smallest_config: Path, value: str) -> None:
    outcome = bncli("train", smallest_config, "--dry-run", "--set", f"train.epochs={value}")
    assert outcome.code == 2
    assert outcome.err.startswith("bncli: error: --set: train.epochs: no valid YAML")
    assert len(outcome.err.splitlines()) == 1


def test_a_byte_order_mark_is_no_problem(bncli: Bncli, smallest_config: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xef\xbb\xbf" + smallest_config.read_bytes())
    assert bncli("train", tmp_path / "config.yaml", "--dry-run").code == 0


def test_a_pipe_or_an_endless_device_is_not_read(bncli: Bncli, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", "/dev/zero"):
        outcome = bncli("train", path)
        assert outcome.code == 2
        assert "a pipe or a device" in outcome.err
