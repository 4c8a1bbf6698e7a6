"""`bncli recalibrate` through the program's entry point; numbers are compared with plain PyTorch's."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bncli.batchnorm import batch_norm_layers
from bncli.checkpoints import Checkpoint, load_checkpoint, load_model, save_checkpoint
from bncli.data import load_dataset
from tests.conftest import Bncli

BUFFERS = (".running_mean", ".running_var")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def stale(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose statistics are off in all layers."""
    content = load_checkpoint(finished_run / "last.pt")
    for key, value in content.state_dict.items():
        if key.endswith(BUFFERS):
            value.mul_(3).add_(1)
    path = tmp_path_factory.mktemp("stale") / "stale.pt"
    save_checkpoint(content, path)
    return path


def training_images(checkpoint: Checkpoint) -> torch.Tensor:
    return load_dataset(checkpoint.config.data).train.images


def inputs_in_eval_mode(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    for name, layer in batch_norm_layers(model):
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].double()}))
    with torch.no_grad():
        model.eval()(images)
    return seen


def test_recalibrate_keeps_its_contract_and_the_old_file(bncli: Bncli, stale: Path, tmp_path: Path) -> None:
    before = sha256(stale)
    outcome = bncli("recalibrate", stale, "-o", tmp_path / "new.pt", "--json")
    assert outcome.code == 0
    result = outcome.json
    assert result.keys() >= {"input", "output", "method", "num_images", "before", "after", "layers"}
    assert (result["input"], result["output"]) == (str(stale), str(tmp_path / "new.pt"))
    assert (result["method"], result["num_images"]) == ("exact", 500)
    for layer in result["layers"]:
        assert layer.keys() >= {"name", "mean_shift_in_new_deviations", "var_ratio", "standard_error"}
        assert layer["mean_shift_in_new_deviations"] > 0.1
        assert layer["var_ratio"] > 1
        assert layer["standard_error"] > 0
    assert sha256(stale) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.pt"]


def test_the_new_statistics_are_those_of_the_layers_inputs_in_eval_mode(
    bncli: Bncli, stale: Path, tmp_path: Path
) -> None:
    """The oracle: hooks on the finished network, all training images at once, moments in float64."""
    assert bncli("recalibrate", stale, "-o", tmp_path / "new.pt").code == 0
    new = load_checkpoint(tmp_path / "new.pt")
    model = load_model(new)
    for name, values in inputs_in_eval_mode(model, training_images(new)).items():
        layer = model.get_submodule(name)
        var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
        assert ((layer.running_mean - mean).abs() / (var + layer.eps).sqrt()).max() < 1e-6
        assert ((layer.running_var - var).abs() / var).max() < 1e-5


def test_only_the_running_statistics_change(bncli: Bncli, stale: Path, tmp_path: Path) -> None:
    bncli("recalibrate", stale, "-o", tmp_path / "new.pt")
    old, new = load_checkpoint(stale), load_checkpoint(tmp_path / "new.pt")
    assert list(old.state_dict) == list(new.state_dict)
    for key, value in old.state_dict.items():
        assert torch.equal(value, new.state_dict[key]) == (not key.endswith(BUFFERS)), key
    assert old.optimizer is not None
    assert new.optimizer is None
    assert (new.epoch, new.step, new.config, new.data_digest) == (
        old.epoch,
        old.step,
        old.config,
        old.data_digest,
    )


def test_before_and_after_are_what_eval_says_of_both_files(bncli: Bncli, stale: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.pt"
    result = bncli("recalibrate", stale, "-o", new, "--json").json
    for path, key in ((stale, "before"), (new, "after")):
        found = bncli("eval", path, "--json", "--num-images", 4).json
        assert result[key]["accuracy"] == found["accuracy"]
        assert result[key]["loss"] == pytest.approx(found["loss"], rel=1e-12)
    checkpoint = load_checkpoint(new)
    assert checkpoint.test_accuracy == result["after"]["accuracy"]
    assert checkpoint.test_loss == result["after"]["loss"]
    assert result["difference"]["loss"] == pytest.approx(result["after"]["loss"] - result["before"]["loss"])
    assert bncli("inspect-stats", new).code == 0


def test_the_new_checkpoint_tells_how_it_was_made(bncli: Bncli, stale: Path, tmp_path: Path) -> None:
    arguments = ("--method", "precise", "--num-images", 100, "--batch-size", 20, "--layers", "stages.1.*")
    bncli("recalibrate", stale, "-o", tmp_path / "new.pt", *arguments)
    record = load_checkpoint(tmp_path / "new.pt").recalibration
    assert record is not None
    expected: dict[str, Any] = {
        "method": "precise",
        "num_images": 100,
        "batch_size": 20,
        "layers": "stages.1.*",
        "recalibrated_layers": ["stages.1.0.norm"],
        "source": {"file": "stale.pt", "sha256": sha256(stale)},
    }
    assert {key: record[key] for key in expected} == expected
    assert record["machine"]["torch"] == str(torch.__version__)
    assert load_checkpoint(stale).recalibration is None


def test_layers_outside_the_glob_keep_their_bits(bncli: Bncli, stale: Path, tmp_path: Path) -> None:
    bncli("recalibrate", stale, "-o", tmp_path / "new.pt", "--layers", "stages.1.*")
    old, new = load_checkpoint(stale).state_dict, load_checkpoint(tmp_path / "new.pt").state_dict
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == {"stages.1.0.norm.running_mean", "stages.1.0.norm.running_var"}


def test_debias_removes_the_start_without_images(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    old = load_checkpoint(finished_run / "last.pt")
    result = bncli(
        "recalibrate", finished_run / "last.pt", "-o", tmp_path / "new.pt", "--method", "debias", "--json"
    )
    assert result.code == 0
    assert result.json["num_images"] == 0
    rest = 0.9**20  # momentum 0.1, 2 epochs of 10 steps
    new = load_checkpoint(tmp_path / "new.pt").state_dict
    for key, value in old.state_dict.items():
        if key.endswith(".running_var"):
            torch.testing.assert_close(new[key], (value - rest) / (1 - rest))


def test_exact_is_verified_and_the_original_is_not(bncli: Bncli, stale: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.pt"
    made = bncli("recalibrate", stale, "-o", new, "--num-images", 300, "--verify", "--json")
    assert made.code == 0
    assert made.json["verification"]["self_consistent"] is True
    again = bncli("recalibrate", new, "--verify", "--json")
    assert again.code == 0
    assert again.json["num_images"] == 300  # those that it was recalibrated on
    assert max(layer["max_relative_error"] for layer in again.json["layers"]) < 1e-6
    refused = bncli("recalibrate", stale, "--verify")
    assert refused.code == 1
    assert "Not self-consistent" in refused.out
    assert bncli("recalibrate", new, "--verify", "--num-images", 400).code == 1  # of other images
    assert bncli("recalibrate", stale, "--verify", "--max-error", 100).code == 0


def test_only_the_layers_that_were_recalibrated_are_verified(
    bncli: Bncli, stale: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new.pt"
    assert bncli("recalibrate", stale, "-o", new, "--layers", "stages.0.*", "--verify").code == 0
    again = bncli("recalibrate", new, "--verify", "--json")
    assert again.code == 0
    assert [layer["name"] for layer in again.json["layers"]] == ["stages.0.0.norm"]
    assert bncli("recalibrate", new, "--verify", "--layers", "*").code == 1


def test_precise_is_no_fixed_point_and_verify_says_so(bncli: Bncli, stale: Path, tmp_path: Path) -> None:
    outcome = bncli("recalibrate", stale, "-o", tmp_path / "new.pt", "--method", "precise", "--verify")
    assert outcome.code == 1
    assert (tmp_path / "new.pt").exists()


@pytest.mark.parametrize(
    ("words", "keeps"),
    [
        (["--method", "precise"], True),
        (["--method", "precise", "--set", "runtime.reuse_memory=false"], False),
        (["--method", "exact"], False),
    ],
)
def test_freed_memory_is_kept_where_every_batch_needs_the_same(
    bncli: Bncli, stale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], keeps: bool
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr("bncli.runtime.keep_freed_memory", lambda: calls.append(True))
    outcome = bncli("recalibrate", stale, "-o", tmp_path / "new.pt", "--no-evaluate", *words)
    assert (outcome.code, bool(calls)) == (0, keeps)


def test_a_tolerance_stops_early_and_says_so(bncli: Bncli, stale: Path, tmp_path: Path) -> None:
    arguments = ("-o", tmp_path / "new.pt", "--batch-size", 10, "--tolerance", 1.0, "--verify", "--json")
    result = bncli("recalibrate", stale, *arguments)
    assert result.code == 0  # verified on the images that were seen
    assert result.json["stopped_early"] is True
    assert result.json["num_images"] == 80


def test_a_network_without_anything_to_gain_is_told_so(bncli: Bncli, stale: Path, tmp_path: Path) -> None:
    bncli("recalibrate", stale, "-o", tmp_path / "once.pt")
    outcome = bncli("recalibrate", tmp_path / "once.pt", "-o", tmp_path / "twice.pt")
    assert outcome.code == 0
    assert "No gain beyond chance: +0.00 points" in outcome.out


@pytest.mark.parametrize("name", ["taken.pt", "link.pt"])
def test_an_existing_file_is_never_written(bncli: Bncli, stale: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "taken.pt").write_text("mine")
    (tmp_path / "link.pt").symlink_to("nowhere")
    outcome = bncli("recalibrate", stale, "-o", tmp_path / name)
    assert outcome.code == 2
    assert "exists already" in outcome.err
    assert (tmp_path / "taken.pt").read_text() == "mine"


def test_the_checkpoint_itself_is_never_written(bncli: Bncli, stale: Path, tmp_path: Path) -> None:
    before = sha256(stale)
    (tmp_path / "same.pt").symlink_to(stale)
    for output in (stale, tmp_path / "same.pt"):
        outcome = bncli("recalibrate", stale, "-o", output)
        assert outcome.code == 2
        assert "is an input, which is never changed" in outcome.err
    assert sha256(stale) == before


def test_a_name_of_another_kind_of_file_is_refused_before_images_are_read(
    bncli: Bncli, stale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_arguments: object, **_options: object) -> None:
        raise AssertionError("images were read")

    monkeypatch.setattr("bncli.data.load_dataset", read)
    outcome = bncli("recalibrate", stale, "-o", tmp_path / "new.npz")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "new.npz: would be a file of PyTorch" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give -o NEW"),
        (("-o", "no/such/folder/new.pt"), "there is no directory"),
        (("-o", "new.pt", "--layers", "nothing.*"), "no BatchNorm layer matches"),
        (("-o", "new.pt", "--tolerance", "0"), "above 0"),
        (("--verify", "--max-error", "-1"), "above 0"),
        (("-o", "new.pt", "--method", "magic"), "magic"),
        (("-o", "new.pt", "--method", "precise", "--set", "data.name=nothing"), "data"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    bncli: Bncli,
    stale: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = bncli("recalibrate", stale, *arguments)
    assert outcome.code == 2
    assert message in outcome.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_recalibration_leaves_nothing_behind(
    bncli: Bncli, stale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupted_in_a_pass(_: object, what: str, done: int, total: int | None = None) -> None:
        if "pass" in what:
            raise KeyboardInterrupt

    before = sha256(stale)
    places = {
        "bncli.cli.progress.ProgressReporter.__call__": interrupted_in_a_pass,
        "bncli.checkpoints.save_checkpoint": interrupted,
    }
    for place, stop in places.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, stop)
            assert bncli("recalibrate", stale, "-o", tmp_path / "new.pt").code == 130
    assert list(tmp_path.iterdir()) == []
    assert sha256(stale) == before


def test_progress_goes_to_stderr_and_the_layers_to_stdout(
    bncli: Bncli, stale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bncli.cli.progress.FIRST_LINE", 0.0)
    outcome = bncli("recalibrate", stale, "-o", tmp_path / "new.pt")
    assert "training images, pass 2 of 2: 500" in outcome.err
    assert "How far the old statistics were off" in outcome.out
    assert "stages.1.0.norm" in outcome.out
    assert "unchanged" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 100


def test_a_verification_shows_its_progress(
    bncli: Bncli, stale: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bncli.cli.progress.FIRST_LINE", 0.0)
    outcome = bncli("recalibrate", stale, "--verify")
    assert "training images, verifying: 500" in outcome.err
