import hashlib
import json
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


def test_eval_answers_in_a_few_lines_with_the_numbers_of_its_json(bncli: Bncli, finished_run: Path) -> None:
    outcome = bncli("eval", finished_run / "last.pt", "--num-images", 100)
    found = bncli("eval", finished_run / "last.pt", "--num-images", 100, "--json").json
    lines = outcome.out.splitlines()
    assert len(lines) <= 15
    assert lines[0].startswith(f"accuracy {found['accuracy']:.2%} of 120 test images in eval mode")
    assert lines[1] == "100 images, each alone and in batches of 2 to 100:"
    in_train = found["determinism"]["train_mode"]["any_batch_size"]
    for mode, num_changed, key in (
        ("eval", 0, "eval_accuracy"),
        ("train", in_train["prediction_flips"], "batch_statistics_accuracy"),
    ):
        (row,) = (line for line in lines if line.startswith(f"{mode} mode"))
        assert f" {num_changed} of 100 " in row
        assert row.endswith(" / ".join(f"{100 * one[key]:.1f}" for one in found["sample_sweep"]) + "%")
    assert [one["batch_size"] for one in found["sample_sweep"]] == [1, 8, 64]
    assert lines[-1] == "In eval mode a prediction does not depend on its batch."


def test_details_show_classes_claims_and_the_digest(bncli: Bncli, finished_run: Path) -> None:
    short = bncli("eval", finished_run / "last.pt", "--num-images", 40).out
    long = bncli("eval", finished_run / "last.pt", "--num-images", 40, "--details").out
    found = bncli("eval", finished_run / "last.pt", "--num-images", 40, "--json").json
    for text in ("checkerboard", "neighbours", "unchanged", found["determinism"]["logits_sha256"]):
        assert text in long
        assert text not in short


def test_the_images_compared_are_of_all_classes_though_a_folder_is_sorted(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    from PIL import Image

    content = torch.load(finished_run / "last.pt", weights_only=True)
    classes = content["class_names"] = sorted(content["class_names"])  # the order of folders
    save_as_if_whole(content, tmp_path / "last.pt")
    for split, count in (("train", 2), ("test", 6)):
        for number, name in enumerate(classes):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for image in range(count):
                Image.new("RGB", (32, 32), (number * 20, image * 9, 30)).save(folder / f"{image}.png")
    outcome = bncli(
        *("eval", tmp_path / "last.pt", "--num-images", 20, "--save", tmp_path / "found.json"),
        *("--set", "data.name=imagefolder", "--set", f"data.root={tmp_path / 'images'}"),
        *("--set", f"data.cache={tmp_path / 'cache'}"),
    )
    assert outcome.code == 0, outcome.err
    images = json.loads((tmp_path / "found.json").read_text())["images"]
    assert sorted({image // 6 for image in images}) == list(range(10))
    assert len(set(images)) == 20


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
    text = " ".join(outcome.out.split())
    assert "64 predictions change with the batch" in text
    assert "The first layer whose output depends on the batch is stages.0.0.norm." in text
    assert "bncli inspect-stats" in text


def test_a_checkpoint_with_nan_is_evaluated_honestly(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    content = torch.load(finished_run / "last.pt", weights_only=True)
    content["state_dict"]["stages.0.0.norm.running_var"][0] = float("nan")
    save_as_if_whole(content, tmp_path / "nan.pt")
    result = bncli("eval", tmp_path / "nan.pt", "--json", "--num-images", 5).json
    assert result["accuracy"] == 0
    assert result["loss"] is None
