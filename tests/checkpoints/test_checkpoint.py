import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bncli.checkpoints import load_checkpoint, load_model, save_checkpoint
from bncli.errors import CheckpointError
from tests.conftest import save_as_if_whole

PNG = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c489")


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("hostile-was-here",))


def test_a_saved_checkpoint_is_loaded_equal(finished_run: Path, tmp_path: Path) -> None:
    first = load_checkpoint(finished_run / "last.pt")
    save_checkpoint(first, tmp_path / "copy.pt")
    second = load_checkpoint(tmp_path / "copy.pt")
    assert replace(second, state_dict={}, optimizer=None) == replace(first, state_dict={}, optimizer=None)
    assert first.state_dict.keys() == second.state_dict.keys()
    assert all(torch.equal(first.state_dict[key], second.state_dict[key]) for key in first.state_dict)


def test_anybody_can_read_a_checkpoint_with_weights_only(finished_run: Path) -> None:
    content = torch.load(finished_run / "last.pt", weights_only=True)
    state = content["state_dict"]
    assert {"running_mean", "running_var", "num_batches_tracked"} <= {key.split(".")[-1] for key in state}
    assert state["stages.0.0.norm.num_batches_tracked"] == 20  # 2 epochs of 10 steps
    assert content["normalization"].keys() == {"mean", "std"}
    assert content["machine"]["torch"] == torch.__version__
    assert len(content["class_names"]) == 10


def test_the_loaded_network_is_in_eval_mode_and_knows_its_normalization(finished_run: Path) -> None:
    checkpoint = load_checkpoint(finished_run / "last.pt")
    model = load_model(finished_run / "last.pt")
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model.normalize.mean.flatten(), torch.tensor(checkpoint.mean))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "an empty file"),
        (b"just text, no checkpoint", "not a checkpoint"),
        (PNG, "not a checkpoint"),
        (b"PK\x03\x04" + bytes(100), "not a checkpoint"),
        (pickle.dumps({"a": 1}), "a pickle, but not of torch.save"),
    ],
)
def test_another_file_is_named_as_no_checkpoint(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(finished_run: Path, tmp_path: Path, fraction: float) -> None:
    whole = (finished_run / "last.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "cut.pt")


def test_missing_files_and_directories_are_named(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="a directory"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"did you mean .*last\.pt"):
        load_checkpoint(finished_run)


def test_no_code_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "bncli.checkpoint", "payload": Hostile()}, tmp_path / "hostile.pt")
    with pytest.raises(CheckpointError, match="does not execute"):
        load_checkpoint(tmp_path / "hostile.pt")
    assert not (tmp_path / "hostile-was-here").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": "other"}, "no bncli checkpoint"),
        ({"format_version": 99}, "upgrade bncli"),
        ({"config": {"train": {"epochs": -1}}}, r"train\.epochs"),
        ({"class_names": None}, "class_names: expected"),
    ],
)
def test_a_checkpoint_with_wrong_contents_is_refused(
    finished_run: Path, tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    content = torch.load(finished_run / "last.pt", weights_only=True)
    save_as_if_whole({**content, **change}, tmp_path / "changed.pt")
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(tmp_path / "changed.pt")


@pytest.mark.parametrize("key", ["normalization", "state_dict", "epoch", "config"])
def test_a_checkpoint_that_lacks_a_part_is_refused(finished_run: Path, tmp_path: Path, key: str) -> None:
    content = torch.load(finished_run / "last.pt", weights_only=True)
    del content[key]
    save_as_if_whole(content, tmp_path / "changed.pt")
    with pytest.raises(CheckpointError, match="incomplete"):
        load_checkpoint(tmp_path / "changed.pt")


def test_tensors_that_do_not_fit_the_configuration_are_refused(finished_run: Path, tmp_path: Path) -> None:
    content = torch.load(finished_run / "last.pt", weights_only=True)
    content["config"]["model"]["widths"] = [8, 17]
    save_as_if_whole(content, tmp_path / "changed.pt")
    with pytest.raises(CheckpointError, match="do not fit its configuration"):
        load_model(tmp_path / "changed.pt")
