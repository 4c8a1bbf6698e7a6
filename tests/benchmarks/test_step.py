"""The benchmark of training steps against a commit."""

from pathlib import Path

import pytest

from tests.benchmarks import step
from tests.benchmarks.conftest import Benchmark


@pytest.mark.slow
def test_this_tree_and_another_take_the_same_steps(
    benchmark: Benchmark, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "mark"

    def unpack(commit: str, folder: Path) -> None:
        """This tree again, which says where it was imported from."""
        (folder / "bncli").symlink_to(step.ROOT / "bncli")
        other.write_text(f"{commit} {folder}")

    monkeypatch.setattr(step, "_unpack", unpack)
    options = ("--rounds", "2", "--steps", "3", "--set", "runtime.weight_gradient=patches")
    outcome = benchmark(step.app, tiny_config, *options, "--json")
    assert outcome.code == 0, outcome.err
    (found,) = outcome.json["configs"]
    assert found["ratio_min"] <= found["ratio"] <= found["ratio_max"]
    assert found["by_patches"] == ["stages.0.0.conv", "stages.1.0.conv"]
    assert min(found["peak_mib"], found["peak_mib_before"]) > 50
    assert other.read_text().startswith(f"{step.BEFORE} ")
    table = benchmark(step.app, tiny_config, *options).out
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.slow
def test_a_commit_that_is_not_there_is_one_line(benchmark: Benchmark, tiny_config: Path) -> None:
    outcome = benchmark(step.app, tiny_config, "--commit", "no-such-commit")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "--commit no-such-commit" in outcome.err
