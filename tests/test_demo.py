import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
import yaml

from bncli.checkpoints import load_checkpoint
from tests.conftest import Bncli

NAMES = ["short_average", "batches_of_2", "averaged_weights", "one_layer_reset"]


def test_four_accidents_are_staged_measured_and_saved(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    outcome = bncli(
        *("demo", finished_run / "last.pt", "--num-images", 100),
        *("--save-dir", tmp_path / "ruins", "--json"),
    )
    assert outcome.code == 0
    result = outcome.json
    assert [ruin["name"] for ruin in result["ruins"]] == NAMES
    assert result["num_test_images"] == 120
    assert result["num_calibration_images"] == 100
    assert result["machine"]["torch"]
    assert result["intact"]["running"]["accuracy"] == load_checkpoint(finished_run / "last.pt").test_accuracy
    for ruin in result["ruins"]:
        found = bncli("eval", ruin["saved"], "--json", "--num-images", 4).json
        assert found["accuracy"] == ruin["gap"]["running"]["accuracy"]
        repaired = bncli(
            *("recalibrate", ruin["saved"], "-o", tmp_path / f"{ruin['name']}.pt", "--num-images", 100),
            *("--method", "precise", "--json"),
        )
        assert repaired.json["after"]["loss"] == pytest.approx(ruin["gap"]["precise"]["loss"], rel=1e-5)


def test_the_accidents_are_what_they_are_called(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    bncli("demo", finished_run / "last.pt", "--num-images", 50, "--save-dir", tmp_path)
    old = load_checkpoint(finished_run / "last.pt")
    ruins = {name: load_checkpoint(tmp_path / f"{name}.pt") for name in NAMES}

    def changed(name: str) -> set[str]:
        new = ruins[name].state_dict
        return {key.split(".")[-1] for key in new if not torch.equal(new[key], old.state_dict[key])}

    assert changed("short_average") == {"running_mean", "running_var"}  # as many steps as in training
    assert changed("batches_of_2") == {"running_mean", "running_var", "num_batches_tracked"}
    assert changed("averaged_weights") == {"weight", "bias"}
    weights = [ruins["averaged_weights"].state_dict[f"stages.{n}.0.norm.weight"].mean() for n in (0, 1)]
    assert all(0.7 < float(weight) < 1.3 for weight in weights)  # an average, no sum: they start at 1
    short = ruins["short_average"]
    assert short.config.model.batch_norm.momentum == 0.001
    assert int(short.state_dict["stages.0.0.norm.num_batches_tracked"]) == 20
    var = short.state_dict["stages.1.0.norm.running_var"]
    assert bool(((var - 1).abs() < 0.3).all())  # 0.98 of it is still the start
    reset = ruins["one_layer_reset"].state_dict
    assert bool((reset["stages.1.0.norm.running_var"] == 1).all())
    assert torch.equal(reset["stages.0.0.norm.running_var"], old.state_dict["stages.0.0.norm.running_var"])


def test_what_was_ruined_is_no_longer_called_measured(
    bncli: Bncli, tiny_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert bncli("train", tiny_config, "--run-dir", run, "--set", "train.ema_epochs=0.5").code == 0
    bncli("demo", run / "last.pt", "--num-images", 50, "--save-dir", tmp_path / "ruins")
    ruined = load_checkpoint(tmp_path / "ruins" / "short_average.pt")
    assert (ruined.averaging, ruined.recalibration) == (None, None)
    found = bncli("inspect-stats", tmp_path / "ruins" / "short_average.pt", "--json").json["findings"]
    assert "BN002" in {finding["code"] for finding in found}


def test_the_table_names_every_accident_and_what_was_found(bncli: Bncli, finished_run: Path) -> None:
    outcome = bncli("demo", finished_run / "last.pt", "--num-images", 50)
    assert outcome.code == 0
    for name in (*NAMES, "the network as it is"):
        assert name in outcome.out
    assert "CPUs" in outcome.out
    assert "synthetic, 120 test images" in outcome.out


def test_a_directory_that_holds_something_is_not_written_into(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine")
    outcome = bncli("demo", finished_run / "last.pt", "--save-dir", tmp_path)
    assert outcome.code == 2
    assert "not empty" in outcome.err


@pytest.mark.slow
def test_without_a_checkpoint_a_network_is_trained_first_and_kept_only_where_asked(
    bncli: Bncli, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    in_here = functools.partial(tempfile.TemporaryDirectory, dir=tmp_path / "temporary")
    monkeypatch.setattr("tempfile.TemporaryDirectory", in_here)
    tiny = yaml.safe_load(tiny_config.read_text())
    sets = [word for name, section in tiny.items() for word in ("--set", f"{name}={json.dumps(section)}")]
    command = ("demo", *sets, "--num-images", 50)
    outcome = bncli(*command, "--save-dir", tmp_path / "kept", "--json")
    assert outcome.code == 0
    assert "no CHECKPOINT is given, so a small network is trained first" in outcome.err
    assert outcome.json["checkpoint"] == str(tmp_path / "kept" / "intact.pt")
    # what was kept is the network that was shown, and the same that `bncli train` makes
    found = bncli("demo", tmp_path / "kept" / "intact.pt", "--num-images", 50, "--json").json
    assert found["intact"] == outcome.json["intact"]
    assert bncli("train", tiny_config, "--run-dir", tmp_path / "run").code == 0
    trained = load_checkpoint(tmp_path / "run" / "last.pt").state_dict
    kept = load_checkpoint(tmp_path / "kept" / "intact.pt").state_dict
    assert all(torch.equal(kept[key], value) for key, value in trained.items())
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow
def test_what_was_trained_for_the_demonstration_is_said_not_to_be_kept(
    bncli: Bncli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("data.num_train=60", "data.num_test=30", "train.epochs=1", "train.batch_size=30")
    outcome = bncli("demo", *(word for key in few for word in ("--set", key)), "--num-images", 30)
    assert outcome.code == 0
    assert "trained for this, and not kept" in outcome.out
    assert not list(tmp_path.iterdir())


def test_without_room_for_a_run_the_demonstration_says_so(
    bncli: Bncli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nowhere = functools.partial(tempfile.TemporaryDirectory, dir=tmp_path / "nowhere")
    monkeypatch.setattr("tempfile.TemporaryDirectory", nowhere)
    outcome = bncli("demo")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("bncli: error: cannot make a temporary directory: No such")
    assert "set TMPDIR" in outcome.err
