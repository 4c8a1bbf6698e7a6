import csv
import io
import json
from pathlib import Path

import pytest

from tests.conftest import Bncli


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_a_run_directory_shows_first_and_last_epoch(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    recorded = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    outcome = bncli("history", finished_run)
    assert outcome.code == 0
    for layer, ends in zip(recorded[0]["layers"], recorded[-1]["layers"], strict=True):
        line = next(line for line in outcome.out.splitlines() if line.startswith(layer["name"]))
        values = (layer["mean_shift"], ends["mean_shift"], layer["var_ratio"], ends["var_ratio"])
        assert line.split()[1:] == [f"{value:.2g}" for value in values]
    document = bncli("history", finished_run, "--json").json
    first = document["layers"][0]["epochs"]
    assert first == [
        {
            "epoch": e["epoch"],
            "mean_shift_in_batch_deviations": e["layers"][0]["mean_shift"],
            **{key: e["layers"][0][key] for key in ("var_ratio", "running_mean_norm", "running_var_norm")},
        }
        for e in recorded
    ]
    table = rows(bncli("history", finished_run, "--csv", "-").out)
    assert [float(r["mean_shift_in_batch_deviations"]) for r in table[:2]] == [
        point["mean_shift_in_batch_deviations"] for point in first
    ]
    assert bncli("history", finished_run, "--layer", "x").code == 2
    assert bncli("history", tmp_path).code == 2
    assert "none of its epochs has ended yet" in bncli("history", tmp_path).err
    assert "no such directory" in bncli("history", tmp_path / "nothing").err
    assert "is a file" in bncli("history", finished_run / "metrics.jsonl").err


@pytest.mark.parametrize("num_epochs", [1, 3])
@pytest.mark.parametrize("num_layers", [1, 40])
def test_a_run_is_drawn_the_same_each_time_with_gaps(
    bncli: Bncli, tmp_path: Path, num_epochs: int, num_layers: int
) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for epoch in range(1, num_epochs + 1):
            layers = [{"name": f"_{i}", "mean_shift": [None, 0.0, 0.3][i % 3], "var_ratio": 1.0 + i}
                      for i in range(num_layers)]  # fmt: skip
            file.write(json.dumps({"epoch": epoch, "layers": layers}) + "\n")
    paths = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in paths:
        assert bncli("history", tmp_path, "--plot", path).code == 0
    text = paths[0].read_text()
    assert paths[1].read_text() == text
    assert "<!-- epoch -->" in text
    assert ("<!-- 14 of 40 layers -->" in text) == (num_layers == 40)
    assert "_0 -->" in text
