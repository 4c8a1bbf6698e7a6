"""What is read of a run and of files."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from bncli.batchnorm import RULES
from bncli.checkpoints import load_checkpoint, open_checkpoint
from bncli.config_file import config_from_dict, load_config
from bncli.errors import CheckpointError, RunError
from bncli.report import checkpoint_of, read_content
from bncli.report.sources import read_training


def facts(content: object) -> dict[str, str]:
    return {fact.name: fact.value for fact in content.facts}


def test_a_run_has_its_training_its_layers_and_where_they_are_from(finished_run: Path) -> None:
    found = read_content([str(finished_run)])
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [epoch["test_accuracy"] for epoch in found.training.epochs] == [
        line["test_accuracy"] for line in lines
    ]
    assert found.training.planned_epochs == 2
    with open_checkpoint(finished_run / "last.pt") as checkpoint:
        assert [layer.name for layer in found.layers] == list(checkpoint.layer_names)
    digest = hashlib.sha256((finished_run / "last.pt").read_bytes()).hexdigest()
    assert facts(found)["SHA-256"] == digest
    assert load_checkpoint(finished_run / "last.pt").data_digest in facts(found)["data"]
    import yaml

    written = config_from_dict(yaml.safe_load(found.configuration), source="the report")
    assert written == load_config(finished_run / "config.yaml")
    assert found.num_rules == len(RULES)
    assert found.how_to_measure == f"bncli report {finished_run} --measure"


def test_how_to_measure_depends_on_whose_file_it_is(finished_run: Path, tmp_path: Path) -> None:
    def command(path: Path) -> str:
        return read_content([str(path)]).how_to_measure

    own = finished_run / "last.pt"
    assert command(own) == f"bncli report {own} --measure"
    assert "trained" in facts(read_content([str(own)]))
    state = load_checkpoint(own).state_dict
    torch.save({"state_dict": state}, tmp_path / "theirs.pt")
    named = f"bncli report {tmp_path / 'theirs.pt'} --measure --model NAME --data-root FOLDER"
    assert command(tmp_path / "theirs.pt") == named
    assert "trained" not in facts(read_content([str(tmp_path / "theirs.pt")]))
    keras = Path(__file__).parent.parent / "frameworks/files/keras_networks/resnet.keras"
    assert command(keras) == ""


def test_a_line_that_was_torn_and_one_of_somebody_else_are_left_out(tmp_path: Path) -> None:
    good = '{"epoch": 1, "test_accuracy": 0.5, "train_loss": null, "note": "<b>"}\n'
    (tmp_path / "metrics.jsonl").write_text(f'{good}[1]\nnull\n{{"epoch": "x"}}\n{{"epoch": 2, "test_ac')
    assert read_training(tmp_path).epochs == [{"epoch": 1, "test_accuracy": 0.5}]


def test_an_epoch_that_was_run_again_counts_once_with_its_last_numbers(tmp_path: Path) -> None:
    lines = [{"epoch": 2, "test_accuracy": 0.1}, {"epoch": 1}, {"epoch": 2, "test_accuracy": 0.9}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_training(tmp_path).epochs == [{"epoch": 1}, {"epoch": 2, "test_accuracy": 0.9}]


def test_the_recalibrated_checkpoint_is_the_one_to_use(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.copy(run / "best.pt", run / "recalibrated.pt")
    assert checkpoint_of(str(run)) == run / "recalibrated.pt"
    (run / "recalibrated.pt").unlink()
    assert checkpoint_of(str(run)) == run / "last.pt"


def test_a_run_without_a_checkpoint_has_only_its_epochs(finished_run: Path, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "config.yaml"):
        shutil.copy(finished_run / name, tmp_path / name)
    found = read_content([str(tmp_path)])
    assert found.layers == ()
    assert found.convergence is not None
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        read_content([str(tmp_path), str(tmp_path)])
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="none of its epochs has ended yet"):
        read_content([str(tmp_path)])


def test_two_are_compared_and_the_second_is_shown(finished_run: Path) -> None:
    found = read_content([str(finished_run / "best.pt"), str(finished_run)])
    assert found.comparison is not None
    assert [fact.value for fact in found.facts if fact.name == "checkpoint"] == [
        str(finished_run / "best.pt"),
        str(finished_run / "last.pt"),
    ]
    assert found.training is None
