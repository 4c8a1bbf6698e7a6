import hashlib
import json
from pathlib import Path

import pytest
import torch

from bncli.checkpoints import load_checkpoint
from bncli.config_file import load_config
from bncli.errors import StoppedError
from bncli.training import EpochDone, train
from tests.conftest import Bncli


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_a_run_may_end_with_a_recalibrated_checkpoint(
    bncli: Bncli, tiny_config: Path, finished_run: Path, tmp_path: Path, method: str
) -> None:
    """last.pt is that of a run without it; recalibrated.pt is what `bncli recalibrate` makes of it."""
    run = tmp_path / "run"
    outcome = bncli("train", tiny_config, "--run-dir", run, "--set", f"train.recalibrate={method}", "--json")
    assert outcome.code == 0
    result = outcome.json
    assert result["checkpoint"] == str(run / "recalibrated.pt")
    assert result["last_checkpoint"] == str(run / "last.pt")
    new, last = load_checkpoint(run / "recalibrated.pt"), load_checkpoint(run / "last.pt")
    assert result["test_accuracy"] == new.test_accuracy
    assert result["recalibration"]["before"]["accuracy"] == last.test_accuracy
    assert new.recalibration is not None
    assert new.recalibration["source"] == {"file": "last.pt", "sha256": sha256(run / "last.pt")}
    plain = load_checkpoint(finished_run / "last.pt")
    assert all(torch.equal(value, last.state_dict[key]) for key, value in plain.state_dict.items())
    assert last.optimizer is not None
    arguments = ("--method", method, "--batch-size", 50)
    assert bncli("recalibrate", run / "last.pt", "-o", tmp_path / "by-hand.pt", *arguments).code == 0
    by_hand = load_checkpoint(tmp_path / "by-hand.pt")
    assert all(torch.equal(value, new.state_dict[key]) for key, value in by_hand.state_dict.items())


def test_a_recalibrated_run_that_is_extended_ends_with_the_bits_of_an_uninterrupted_one(
    bncli: Bncli, tiny_config: Path, tmp_path: Path
) -> None:
    arguments = ("--set", "train.recalibrate=exact", "--set", "train.decay=none", "--set", "train.warmup=0")
    bncli("train", tiny_config, "--run-dir", tmp_path / "whole", *arguments, "--set", "train.epochs=3")
    bncli("train", tiny_config, "--run-dir", tmp_path / "parts", *arguments)
    bncli("train", "--resume", tmp_path / "parts", "--set", "train.epochs=3")
    for name in ("last.pt", "recalibrated.pt"):
        whole, parts = (load_checkpoint(tmp_path / run / name).state_dict for run in ("whole", "parts"))
        assert all(torch.equal(value, parts[key]) for key, value in whole.items()), name
    assert load_checkpoint(tmp_path / "parts" / "recalibrated.pt").epoch == 3


def test_a_finished_run_can_be_recalibrated_later(bncli: Bncli, tiny_config: Path, tmp_path: Path) -> None:
    bncli("train", tiny_config, "--run-dir", tmp_path / "run")
    before = sha256(tmp_path / "run" / "last.pt")
    assert not (tmp_path / "run" / "recalibrated.pt").exists()
    outcome = bncli("train", "--resume", tmp_path / "run", "--set", "train.recalibrate=precise")
    assert outcome.code == 0
    assert "to resume from" in outcome.out
    assert sha256(tmp_path / "run" / "last.pt") == before
    assert (tmp_path / "run" / "recalibrated.pt").is_file()


def test_without_it_the_result_is_last(bncli: Bncli, finished_run: Path) -> None:
    result = bncli("train", "--resume", finished_run, "--json").json
    assert result["checkpoint"] == result["last_checkpoint"] == str(finished_run / "last.pt")
    assert result["recalibration"] is None


def test_a_network_without_running_statistics_is_refused_before_it_is_trained(
    bncli: Bncli, tiny_config: Path, tmp_path: Path
) -> None:
    arguments = ("--set", "train.recalibrate=exact", "--set", "model.batch_norm.track_running_stats=false")
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "run", *arguments)
    assert outcome.code == 2
    assert "train.recalibrate" in outcome.err
    assert not (tmp_path / "run").exists()


def test_it_is_not_part_of_the_metrics(bncli: Bncli, tiny_config: Path, tmp_path: Path) -> None:
    bncli("train", tiny_config, "--run-dir", tmp_path / "run", "--set", "train.recalibrate=exact")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_a_run_stopped_while_it_is_recalibrated_is_complete_but_for_that(
    tiny_config: Path, tmp_path: Path
) -> None:
    run, events = tmp_path / "run", []

    def stop() -> bool:
        return len(events) == 2  # both epochs are reported: what is left is the recalibration

    config = load_config(tiny_config, ["train.recalibrate=exact"])
    with pytest.raises(StoppedError, match="continue with"):
        train(
            config,
            run,
            report=lambda event: events.append(event) if isinstance(event, EpochDone) else None,
            stop=stop,
        )
    assert sorted(path.name for path in run.iterdir() if path.name[0] != ".") == [
        "best.pt",
        "config.yaml",
        "last.pt",
        "metrics.jsonl",
    ]
    assert load_checkpoint(run / "last.pt").epoch == 2
    assert train(config, run, resume=True).checkpoint == run / "recalibrated.pt"
