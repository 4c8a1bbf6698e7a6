from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bncli.checkpoints import load_checkpoint, save_checkpoint
from bncli.evaluation import Gap, LayerGap, Outcomes, PairedDifference, Score, compare_outcomes
from tests.conftest import Bncli

FAST = ("--num-images", 4, "--batch-sizes", "2")


@pytest.fixture(scope="module")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained long enough that there is something to lose."""
    from bncli.cli.app import main

    folder = tmp_path_factory.mktemp("good")
    (folder / "config.yaml").write_text(
        """
data: {name: synthetic, num_train: 1000, num_test: 300}
model: {widths: [8, 16, 16], blocks_per_stage: 1}
train: {epochs: 4, batch_size: 50, learning_rate: 0.2, recalibrate: exact}
runtime: {device: cpu, precision: float32, threads: 1, eval_batch_size: 60}
"""
    )
    assert main(["train", str(folder / "config.yaml"), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def ruined(run: Path, layer: str, folder: Path) -> Path:
    checkpoint = load_checkpoint(run / "recalibrated.pt")
    checkpoint.state_dict[f"{layer}.running_mean"].zero_()
    checkpoint.state_dict[f"{layer}.running_var"].fill_(1.0)
    save_checkpoint(checkpoint, folder / "ruined.pt")
    return folder / "ruined.pt"


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param("stages.0.0.norm", marks=pytest.mark.slow),
        "stages.1.0.norm",
        pytest.param("stages.2.0.norm", marks=pytest.mark.slow),
    ],
)
def test_the_layer_whose_statistics_were_lost_is_named_and_recalibration_brings_it_back(
    bncli: Bncli, good_run: Path, tmp_path: Path, layer: str
) -> None:
    path = ruined(good_run, layer, tmp_path)
    outcome = bncli("eval", path, "--gap", "--json", *FAST)
    assert outcome.code == 0  # a gap is an answer, no failure
    gap = outcome.json["gap"]
    assert gap["worst_layer"] == layer
    assert gap["running"]["accuracy"] == outcome.json["accuracy"]
    assert gap["batch_norm_is_to_blame"] is True
    for name in ("running", "batch", "precise", "exact"):
        assert gap[name].keys() >= {"accuracy", "loss"}
    assert [one["name"] for one in gap["layers"]] == ["stages.0.0.norm", "stages.1.0.norm", "stages.2.0.norm"]
    assert all(one["self_consistency"] >= 0 for one in gap["layers"])
    for method in ("exact", "precise"):
        arguments = ("-o", tmp_path / f"{method}.pt", "--method", method, "--json")
        repaired = bncli("recalibrate", path, *arguments).json
        assert repaired["after"]["accuracy"] == pytest.approx(gap[method]["accuracy"], abs=1e-9)
        assert repaired["verdict"].startswith("A gain")
    healthy = load_checkpoint(good_run / "recalibrated.pt")
    assert load_checkpoint(tmp_path / "exact.pt").test_accuracy == healthy.test_accuracy


def test_a_healthy_network_is_called_healthy(bncli: Bncli, good_run: Path) -> None:
    outcome = bncli("eval", good_run / "recalibrated.pt", "--gap", *FAST)
    assert outcome.code == 0
    assert "No gain beyond chance" in outcome.out
    assert "run bncli recalibrate" not in outcome.out
    assert "not tried" in outcome.out


def test_the_ordinary_report_stays(bncli: Bncli, good_run: Path) -> None:
    outcome = bncli("eval", good_run / "last.pt", "--gap", "--num-calibration-images", 120, *FAST)
    assert "In eval mode a prediction does not depend on its batch." in outcome.out
    assert "against 120 training images" in outcome.out
    assert "The same 300 test images" in outcome.out
    assert bncli("eval", good_run / "last.pt", "--json", *FAST).json["gap"] is None


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_of_the_gap(bncli: Bncli, good_run: Path, tmp_path: Path, suffix: str) -> None:
    path = ruined(good_run, "stages.1.0.norm", tmp_path)
    plot = tmp_path / f"gap.{suffix}"
    outcome = bncli("eval", path, "--gap", "--plot", plot, "--num-calibration-images", 120, *FAST)
    assert outcome.code == 0
    if suffix == "svg":
        text = plot.read_text()
        assert "stages.1.0.norm" in text or "<path" in text
    else:
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_one_plot_shows_one_thing(bncli: Bncli, good_run: Path, tmp_path: Path) -> None:
    both = ("--plot", tmp_path / "a.png", "--gap", "--sweep", "1,2")
    for arguments in (("--plot", tmp_path / "a.png"), both):
        outcome = bncli("eval", good_run / "last.pt", *arguments)
        assert outcome.code == 2
        assert "--plot" in outcome.err


def test_batch_invariance_does_not_change_the_gap(bncli: Bncli, good_run: Path, tmp_path: Path) -> None:
    path = ruined(good_run, "stages.1.0.norm", tmp_path)
    arguments = ("--gap", "--json", "--num-calibration-images", 120, *FAST)
    plain = bncli("eval", path, *arguments).json["gap"]
    chunked = bncli("eval", path, "--batch-invariant", *arguments).json["gap"]
    assert plain["worst_layer"] == chunked["worst_layer"] == "stages.1.0.norm"
    for name in ("running", "batch", "precise", "exact"):
        assert plain[name]["accuracy"] == pytest.approx(chunked[name]["accuracy"], abs=0.01)


def difference(gained: int, lost: int) -> PairedDifference:
    first, second = (
        torch.arange(1000) < lost,
        (torch.arange(1000) >= lost) & (torch.arange(1000) < lost + gained),
    )
    return compare_outcomes(*(Outcomes(right, torch.zeros(1000).double()) for right in (first, second)))


def gap_with(explained: PairedDifference, beyond: PairedDifference, recovered: float | None = None) -> Gap:
    score = Score(0.5, 1.0)
    best = Score(0.5 + explained.accuracy, 1.0)
    layers = (LayerGap("first", 0.1, 0.1, 1.0, 0.0), LayerGap("second", 0.5, 0.5, 1.0, recovered))
    worst = "second" if recovered else None
    return Gap(1000, 500, 1000, score, best, best, best, explained, beyond, layers, worst)


def test_the_verdict_says_what_is_gained_by_what() -> None:
    gain, none, loss = difference(312, 0), difference(3, 3), difference(0, 50)
    assert gap_with(gain, none, 0.31).verdict == (
        "The running statistics are stale: exact population statistics gain 31.2 points of accuracy."
        " Layer second is to blame: to repair it alone gains 31.0. Run bncli recalibrate."
    )
    fewer = replace(gap_with(gain, none, 0.31), num_trial_images=100)
    assert "alone gains 31.0 (on 100 of the images). Run" in fewer.verdict
    assert "Several layers are to blame, second most of all" in gap_with(gain, none, 0.1).verdict
    assert "To repair a single layer gains nothing." in gap_with(gain, none).verdict
    assert gap_with(gain, gain, 0.31).verdict.endswith("31.2 more: they look different from training images.")
    assert gap_with(none, none).verdict.startswith("No gain beyond chance")
    assert "look different from training images" in gap_with(none, gain).verdict
    assert "would lose accuracy, -5.00 points" in gap_with(loss, none).verdict
