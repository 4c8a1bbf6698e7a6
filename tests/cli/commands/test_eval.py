import hashlib
from pathlib import Path

import pytest
import torch

from bncli.checkpoints import load_checkpoint
from tests.conftest import Bncli, save_as_if_whole


def test_eval_keeps_its_contract_and_agrees_with_the_run(bncli: Bncli, finished_run: Path) -> None:
    outcome = bncli("eval", finished_run / "last.pt", "--json", "--num-images", 40)
    assert outcome.code == 0
    result = outcome.json
    checkpoint = load_checkpoint(finished_run / "last.pt")
    assert result["num_images"] == 120
    assert result["accuracy"] == checkpoint.test_accuracy
    assert result["loss"] == pytest.approx(checkpoint.test_loss)
    assert result["images_per_second"] > 0
    assert list(result["per_class_accuracy"]) == list(checkpoint.class_names)
    determinism = result["determinism"]
    assert determinism["num_images"] == 40
    assert determinism["repeat_bitwise_equal"] is True
    assert determinism["running_stats_unchanged"] is True
    for check in determinism["batch_sizes"]:
        assert check.keys() >= {"batch_size", "bitwise_equal", "max_abs_diff", "prediction_flips"}
        assert check["prediction_flips"] == 0
        assert check["max_abs_diff"] < 1e-3
    assert determinism["train_mode"]["max_abs_diff"] > 0.1
    assert determinism["train_mode"]["prediction_flips"] > 0


def test_eval_shows_accuracy_classes_and_a_verdict(bncli: Bncli, finished_run: Path) -> None:
    outcome = bncli("eval", finished_run / "last.pt", "--num-images", 40)
    assert "checkerboard" in outcome.out
    assert "In eval mode every image gets the prediction it gets alone" in outcome.out
    assert "unchanged" in outcome.out


def test_eval_never_changes_the_checkpoint(bncli: Bncli, finished_run: Path) -> None:
    before = hashlib.sha256((finished_run / "last.pt").read_bytes()).hexdigest()
    bncli("eval", finished_run / "last.pt", "--num-images", 10)
    bncli("inspect-stats", finished_run / "last.pt")
    assert hashlib.sha256((finished_run / "last.pt").read_bytes()).hexdigest() == before


def test_eval_can_be_pointed_at_other_data(bncli: Bncli, finished_run: Path) -> None:
    here = bncli("eval", finished_run / "last.pt", "--json", "--num-images", 5).json
    there = bncli("eval", finished_run / "last.pt", "--json", "--num-images", 5, "--set", "data.seed=3").json
    assert there["num_images"] == 120
    assert there["loss"] != here["loss"]


def test_data_of_other_classes_is_refused(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), "red").save(folder / "0.png")
    outcome = bncli(
        "eval",
        finished_run / "last.pt",
        *("--set", "data.name=imagefolder"),
        *("--set", f"data.root={tmp_path / 'images'}"),
        *("--set", f"data.cache={tmp_path / 'cache'}"),
    )
    assert outcome.code == 2
    assert "cat, dog" in outcome.err


def test_images_of_another_size_are_refused_with_the_fix(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for name in load_checkpoint(finished_run / "last.pt").class_names:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), "red").save(folder / "0.png")
    arguments = [
        *("eval", finished_run / "last.pt", "--num-images", 5),
        *("--set", "data.name=imagefolder"),
        *("--set", f"data.root={tmp_path / 'images'}"),
        *("--set", f"data.cache={tmp_path / 'cache'}"),
    ]
    outcome = bncli(*arguments, "--set", "data.image_size=16")
    assert outcome.code == 2
    assert "data.image_size=32" in outcome.err


def test_a_network_whose_predictions_depend_on_the_batch_exits_with_1(
    bncli: Bncli, tiny_config: Path, tmp_path: Path
) -> None:
    """Without running statistics eval mode normalises by the batch: the check must say no."""
    bncli(
        "train",
        tiny_config,
        *("--run-dir", tmp_path / "run"),
        *("--set", "model.batch_norm.track_running_stats=false"),
    )
    outcome = bncli("eval", tmp_path / "run" / "last.pt", "--num-images", 64)
    assert outcome.code == 1
    assert "depend on the batch" in outcome.out


def test_a_checkpoint_with_nan_is_evaluated_honestly(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    content = torch.load(finished_run / "last.pt", weights_only=True)
    content["state_dict"]["stages.0.0.norm.running_var"][0] = float("nan")
    save_as_if_whole(content, tmp_path / "nan.pt")
    result = bncli("eval", tmp_path / "nan.pt", "--json", "--num-images", 5).json
    assert result["accuracy"] == 0
    assert result["loss"] is None
