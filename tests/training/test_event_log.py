"""TensorBoard's event files, read by TensorBoard itself, against metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

import pytest

from bncli.config_file import load_config
from bncli.errors import ConfigError
from bncli.training import train

LOG = ["train.log=[tensorboard]"]


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    files = event_accumulator.EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=True)
    files.Reload()
    return {
        tag: [(event.step, event.value) for event in files.Scalars(tag)] for tag in files.Tags()["scalars"]
    }


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_shows_the_numbers_of_the_metrics_under_their_names(
    tiny_config: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    train(load_config(tiny_config, LOG), run)
    found, expected = scalars(run), lines(run)
    single = {name for line in expected for name, value in line.items() if isinstance(value, int | float)}
    layers = {f"{key}/{layer['name']}" for line in expected for layer in line["layers"] for key in layer}
    assert set(found) == single | {name for name in layers if not name.startswith("name/")}
    for line in expected:
        for name in single:
            assert (line["step"], pytest.approx(line[name])) in found[name]
        for layer in line["layers"]:
            name = f"mean_shift/{layer['name']}"
            assert (line["step"], pytest.approx(layer["mean_shift"])) in found[name]


def test_a_run_that_is_resumed_goes_on_in_the_same_log(tiny_config: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    train(load_config(tiny_config, [*LOG, "train.epochs=1", "train.decay=none"]), run)
    train(load_config(tiny_config, [*LOG, "train.decay=none"]), run, resume=True)
    assert [step for step, _ in scalars(run)["test_accuracy"]] == [line["step"] for line in lines(run)]


def test_without_the_package_nothing_is_begun(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bncli.training.event_log.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'train.log: tensorboard .* pip install "bncli\[tensorboard\]"'):
        train(load_config(tiny_config, LOG), tmp_path / "run")
    assert not (tmp_path / "run").exists()
