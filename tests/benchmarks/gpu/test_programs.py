"""The programs for a machine with a GPU run to their end on a CPU, so that no lent minute goes to a slip."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "gpu.sh"


def lines_of(part: str, folder: Path, *words: str, file: str = "speed") -> dict[str, dict[str, Any]]:
    """What a part wrote, by name."""
    environment = os.environ | {"DEVICE": "cpu", "OUT": str(folder), "PYTHON": sys.executable}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        ["bash", str(SCRIPT), part, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert "exit code 0" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    lines = (folder / f"{file}.jsonl").read_text().splitlines()
    return {line["name"]: line for line in map(json.loads, lines)}


@pytest.mark.slow
def test_everything_that_is_promised_is_tried(tmp_path: Path) -> None:
    found = lines_of("correctness", tmp_path, "1000", "--small", file="correctness")
    assert {"machine", "resumed run", "last good step", "fixed point: resnet18"} <= set(found)
    assert [name for name, line in found.items() if not line.get("ok", True)] == []
    assert [name for name, line in found.items() if "left_out" in line] == []
    # what is promised on a CPU
    assert found["repeated runs"]["float32 same_bits"]
    assert found["resumed run"]["same_bits"]
    for precision in ("float32", "bfloat16", "float16"):
        line = found[f"certificate: resnet18, {precision}, batch-invariant"]
        assert line["first_layers"] == []


@pytest.mark.slow
def test_steps_are_timed_and_whole_runs_stand_beside_the_rivals(tmp_path: Path) -> None:
    found = lines_of("steps", tmp_path, "600", "--small", "--modes", "eager")
    assert found["fastest mode"]["mode"] == "eager"
    assert found["step eager"]["milliseconds"] > 0
    assert 0 < found["step eager"]["share_of_peak"] < 1
    assert found["step of the rival"]["n"] == 4
    assert (tmp_path / "profile-eager.txt").stat().st_size > 0
    options = ("--synthetic", "--small", "--mode", "eager", "--seeds", "2", "--recipes", "8 epochs")
    found = lines_of("runs", tmp_path, "600", *options)
    for name in ("rival", "8 epochs"):
        assert found[f"mean: {name}"]["n"] == 2
        assert 0 <= found[f"mean: {name}"]["views_accuracy"] <= 1
    ours, rivals = (found[f"mean: {name}"]["seconds"] for name in ("8 epochs", "rival"))
    seeds = [found[f"seed {seed}: 8 epochs"]["seconds"] for seed in (0, 1)]
    assert ours == pytest.approx(sum(seeds) / 2)
    assert rivals > 0
