"""The last line of a run: running statistics against batch statistics, on the same test images."""

import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bncli.training.agreement
from bncli.checkpoints import load_checkpoint, load_model
from bncli.cli.tables.train import show_training
from bncli.config import Config
from bncli.config_file import load_config
from bncli.data import sample_batches
from bncli.errors import StoppedError
from bncli.evaluation import PairedDifference, Score
from bncli.training import TrainResult, prepare, train
from bncli.training.agreement import Agreement, measure_agreement
from tests.conftest import Bncli


@pytest.fixture(scope="module")
def stale_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A network that has learnt something, with running statistics that are still near where they began."""
    learning = ["train.learning_rate=0.3", "train.batch_size=25", "train.epochs=6", "augment.crop_padding=0"]
    short = ["train.evaluate_every=6", "data.num_test=500", "model.batch_norm.momentum=0.001"]
    return train(load_config(tiny_config, learning + short), tmp_path_factory.mktemp("stale") / "a run")


def test_both_accuracies_are_those_of_the_two_modes(tiny_config: Path, tmp_path: Path) -> None:
    config = load_config(tiny_config, ["train.batch_size=32"])
    result = train(config, tmp_path / "run")
    model, test = load_model(result.checkpoint), prepare(config).dataset.test
    batches = list(sample_batches(test, 32, 96))  # 3 batches of 32: of 120 images 24 would be a smaller one
    right = {}
    for mode in (False, True):
        model.train(mode)  # the network has no dropout
        with torch.no_grad():
            right[mode] = torch.cat([model(images).argmax(1) == labels for images, labels in batches])
    agreement = result.agreement
    assert agreement is not None
    assert (agreement.num_images, agreement.batch_size) == (96, 32)
    assert agreement.running.accuracy == right[False].double().mean()
    assert agreement.batch.accuracy == right[True].double().mean()
    assert agreement.difference.num_gained == (right[True] & ~right[False]).sum()
    assert (agreement.momentum, agreement.num_updates) == (0.1, 30)
    assert not agreement.recalibrated


def test_stale_statistics_are_named_and_the_command_that_is_printed_repairs_them(
    bncli: Bncli, stale_run: TrainResult, capfd: pytest.CaptureFixture[str]
) -> None:
    show_training(stale_run)
    text = " ".join(capfd.readouterr().out.split())
    assert "Running statistics (momentum 0.001, 120 updates) are behind batch statistics: accuracy" in text
    show_training(replace(stale_run, model="/a b/net.py:net"))  # whose code a checkpoint may not name
    assert capfd.readouterr().out.endswith(" --model '/a b/net.py:net'\n")
    command = text.partition("To measure them anew: bncli ")[2]
    assert command
    assert bncli(*shlex.split(command)).code == 0
    anew = load_checkpoint(stale_run.run_dir / "recalibrated.pt")
    agreement = measure_agreement(anew, prepare(anew.config), lambda: False)
    assert agreement is not None
    assert agreement.recalibrated
    assert not agreement.eval_mode_is_behind


def test_where_new_statistics_are_behind_too_the_gap_is_to_be_explained(
    stale_run: TrainResult, capfd: pytest.CaptureFixture[str]
) -> None:
    assert stale_run.agreement is not None
    show_training(replace(stale_run, agreement=replace(stale_run.agreement, recalibrated=True)))
    text = " ".join(capfd.readouterr().out.split())
    assert text.endswith(f"To see why: bncli eval {shlex.quote(str(stale_run.checkpoint))} --gap")


def test_json_has_the_numbers_and_the_verdict(stale_run: TrainResult) -> None:
    found = stale_run.to_dict()["agreement"]
    assert found["eval_mode_is_behind"] is True
    assert found["verdict"] == str(stale_run.agreement)
    assert found["batch"]["accuracy"] > found["running"]["accuracy"]


def test_statistics_that_keep_up_agree(bncli: Bncli, tiny_config: Path, tmp_path: Path) -> None:
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "run")
    text = " ".join(outcome.out.split())
    assert "100 test images are too few to tell whether running statistics (momentum 0.1, 20 updates)" in text
    assert "bncli" not in text.partition("test images are")[2]
    assert all(len(line.rstrip()) <= 80 for line in outcome.out.splitlines() if str(tmp_path) not in line)


def verdict(gained: int, lost: int, momentum: float | None = 0.1, *, recalibrated: bool = False) -> str:
    difference = PairedDifference(2000, gained, lost, (gained - lost) / 2000, 0.01, 0.0, 0.01)
    scores = Score(0.5, 1.0), Score(0.5 + difference.accuracy, 1.0)
    return Agreement(2000, 250, momentum, 1200, recalibrated, *scores, difference).verdict


def test_of_few_images_nothing_is_said_to_agree() -> None:
    scores = Score(0.4688, 1.0), Score(0.5938, 1.0)
    difference = PairedDifference(32, 8, 4, 0.125, 0.108, 0.0, 0.1)
    found = Agreement(32, 16, 0.1, 10, False, *scores, difference)
    assert not found.eval_mode_is_behind
    assert found.verdict.startswith("32 test images are too few to tell whether running statistics")


def test_only_what_exceeds_chance_is_a_difference() -> None:
    assert verdict(12, 10) == (
        "Running statistics (momentum 0.1, 1,200 updates) agree with batch statistics within chance: accuracy"
        " 50.00% in eval mode and 50.10% in batches of 250 (2,000 test images)."
    )
    assert "(cumulative average, 1,200 updates) are behind" in verdict(100, 10, None)
    assert "(measured anew) do better than batch statistics: " in verdict(10, 100, recalibrated=True)


def by_loss(
    running: float, batch: float, error: float, *, gained: int = 5, lost: int = 3, num_images: int = 500
) -> Agreement:
    accuracy = (gained - lost) / num_images
    difference = PairedDifference(num_images, gained, lost, accuracy, 0.01, batch - running, error)
    scores = Score(0.142, running), Score(0.142 + accuracy, batch)
    return Agreement(num_images, 250, 0.1, 8, False, *scores, difference)


def test_a_loss_far_above_that_of_batch_statistics_is_told_where_accuracies_agree() -> None:
    found = by_loss(69.27, 2.43, 1.3)
    assert found.eval_mode_is_behind
    assert found.to_dict()["loss_is_behind"] is True
    assert found.verdict == (
        "Running statistics (momentum 0.1, 8 updates) do not fit the network: loss 69.27 in eval mode and"
        " 2.43 in batches of 250, though accuracy, 14.20% and 14.60%, does not show it (500 test images)."
        " Train for more steps, or set train.recalibrate=precise."
    )
    assert "set train" not in replace(found, recalibrated=True).verdict
    assert by_loss(69.27, 2.43, 1.3, lost=60).loss_is_behind  # at chance a few images more say nothing
    assert by_loss(math.inf, 2.43, math.nan).loss_is_behind
    assert "are behind batch statistics: accuracy" in by_loss(69.27, 2.43, 1.3, gained=200).verdict


@pytest.mark.parametrize(
    ("running", "batch", "error", "num_images"),
    [
        (0.2247, 0.2251, 0.001, 500),  # as README's
        (0.9, 0.01, 0.01, 500),  # a fraction of a nat
        (4.4, 2.3, 0.5, 500),  # few images, far off: chance
        (6.0, 3.1, 0.01, 500),  # less than twice
        (2.43, 69.27, 1.3, 500),  # batch statistics are the worse ones
        (math.nan, math.nan, math.nan, 500),
        (9.0, 2.0, 0.01, 20),
    ],
)
def test_a_loss_that_is_higher_for_other_reasons_is_no_alarm(
    running: float, batch: float, error: float, num_images: int
) -> None:
    found = by_loss(running, batch, error, num_images=num_images)
    assert not found.loss_is_behind
    assert not found.eval_mode_is_behind


def test_without_running_statistics_nothing_is_compared(tiny_config: Path, tmp_path: Path) -> None:
    config = load_config(tiny_config, ["model.batch_norm.track_running_stats=false", "train.epochs=1"])
    assert train(config, tmp_path / "run").agreement is None


def test_at_most_2000_images_in_whole_batches_are_computed(
    tiny_config: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bncli.training.agreement, "NUM_IMAGES", 70)
    checkpoint = load_checkpoint(finished_run / "last.pt")
    setup = prepare(load_config(tiny_config))
    asked = []
    found = measure_agreement(checkpoint, setup, lambda: bool(asked.append(0)))
    assert found is not None
    assert (found.num_images, found.batch_size, len(asked)) == (50, 50, 2)
    parts = Config.model_validate(setup.config.model_dump() | {"train": {"micro_batch_size": 20}})
    found = measure_agreement(checkpoint, replace(setup, config=parts), lambda: False)
    assert found is not None
    assert (found.num_images, found.batch_size) == (60, 20)  # as BatchNorm normalised them in training


def test_no_bit_of_the_run_changes(
    tiny_config: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bncli.training.agreement, "measure_agreement", lambda *_: None)
    train(load_config(tiny_config), tmp_path / "without")
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(run / name).state_dict for run in (finished_run, tmp_path / "without"))
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_stop_meanwhile_leaves_a_whole_run(tiny_config: Path, tmp_path: Path) -> None:
    config = load_config(tiny_config)
    reached = []

    def stop() -> bool:
        if (tmp_path / "run" / "metrics.jsonl").exists():
            reached.append((tmp_path / "run" / "metrics.jsonl").read_text().count("\n"))
        return reached[-2:] == [2, 2]  # after the second and last epoch, in the comparison

    with pytest.raises(StoppedError, match="stopped after step 20 of 20; continue with"):
        train(config, tmp_path / "run", stop=stop)
    result = train(config, tmp_path / "run", resume=True)
    assert result.agreement is not None
    assert result.epochs == 2
