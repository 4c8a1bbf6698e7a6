"""Files of PaddlePaddle, MXNet, Chainer, MindSpore and MLX against the frameworks' own answers.

The files are made by tests/frameworks/make_paddle.py, make_mxnet.py, make_mindspore.py and make_mlx.py.
"""

import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from bncli.checkpoints import open_checkpoint
from bncli.errors import CheckpointError
from tests.checkpoints.formats.damage import damaged, flips, is_read, is_refused
from tests.checkpoints.formats.framework_answers import check_answers, files_of
from tests.frameworks.recorded import FILES

FRAMEWORKS = [name for name in ("paddle", "mxnet", "chainer", "mindspore", "mlx") if (FILES / name).is_dir()]
ALL = [(framework, file) for framework in FRAMEWORKS for file in files_of(framework)]


@pytest.mark.parametrize(("framework", "file"), ALL)
def test_layers_are_those_of_the_framework(framework: str, file: str) -> None:
    check_answers(framework, file)


@pytest.mark.parametrize("num_flipped", [60, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("framework", "file"), ALL)
def test_damage_is_said_in_one_line(tmp_path: Path, framework: str, file: str, num_flipped: int) -> None:
    for path in (FILES / framework).iterdir():
        if path.suffix in (".json", ".pdmodel") and path.name != "expected.json":
            shutil.copy(path, tmp_path)
    content = (FILES / framework / file).read_bytes()
    read = [is_read(tmp_path / file, data) for data in damaged(content, num_flipped)]
    assert not all(read[:20])


def network() -> dict[str, np.ndarray]:
    """As detectron2 calls them."""
    return {
        f"{layer}.norm.{leaf}": np.array([value, 2], "f4")
        for layer in ("stem.conv1", "res2.0.conv1", "res2.10.conv1")
        for value, leaf in enumerate(("weight", "bias", "running_mean", "running_var"))
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_detectron2_is_read_and_not_unpickled(tmp_path: Path, protocol: int) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "was executed",)

    content = {"model": network(), "__author__": "x", "matching_heuristics": True, "evil": Evil()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    with open_checkpoint(tmp_path / "a.pkl") as checkpoint:
        layers = checkpoint.layers()
    assert [layer.name for layer in layers] == [
        "stem.conv1.norm", "res2.0.conv1.norm", "res2.10.conv1.norm"
    ]  # fmt: skip
    assert layers[1].running_var.tolist() == [3, 2]
    assert not (tmp_path / "was executed").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("sign", [".", "/"])
def test_arrays_of_numpy_are_read_with_dots_and_slashes(tmp_path: Path, save: object, sign: str) -> None:
    arrays = {name.replace(".", sign): array for name, array in network().items()}
    save(tmp_path / "a.npz", **arrays, objects=np.array([{}, 1], dtype=object))  # type: ignore[operator]
    with open_checkpoint(tmp_path / "a.npz") as checkpoint:
        layers = checkpoint.layers()
        assert "objects" not in checkpoint.tensors
    assert [layer.name for layer in layers][2] == "res2.10.conv1.norm"
    assert layers[2].running_mean.tolist() == [2, 2]


def test_layers_that_chainer_never_called_are_named(tmp_path: Path) -> None:
    """As it writes them where their size is not told when they are made: with arrays of None."""
    leaves = ("gamma", "beta", "avg_mean", "avg_var")
    arrays = {f"bn/{leaf}": np.ones(3, np.float32) for leaf in leaves}
    uncalled = {f"block/lazy/{leaf}": np.array(None) for leaf in leaves}
    np.savez(tmp_path / "a.npz", **arrays, **uncalled)
    with open_checkpoint(tmp_path / "a.npz") as checkpoint:
        assert checkpoint.layer_names == ("bn",)
        assert checkpoint.notes[-1].startswith("1 layer (block.lazy) has no numbers: Chainer makes them in")
    np.savez(tmp_path / "b.npz", **uncalled)
    with pytest.raises(CheckpointError, match=r"a file of Chainer, in which 1 layer \(block.lazy\) has no"):
        open_checkpoint(tmp_path / "b.npz").__enter__()


def test_what_has_no_order_is_sorted_as_a_person_would(tmp_path: Path) -> None:
    names = list(network())
    np.savez(tmp_path / "a.npz", **{name: network()[name] for name in reversed(names)})
    with open_checkpoint(tmp_path / "a.npz") as checkpoint:
        found = [layer.name for layer in checkpoint.layers()]
    assert found == ["res2.0.conv1.norm", "res2.10.conv1.norm", "stem.conv1.norm"]


def test_bare_sixteen_bits_of_paddle_are_bfloat16() -> None:
    with open_checkpoint(FILES / "paddle" / "bfloat16.pdparams") as checkpoint:
        assert {layer.running_mean.dtype for layer in checkpoint.layers()} == {torch.bfloat16}


def test_an_export_of_paddle_needs_its_own_program(tmp_path: Path) -> None:
    shutil.copy(FILES / "paddle" / "net.pdiparams", tmp_path)
    with pytest.raises(CheckpointError, match=r"program beside it, net\.json or net\.pdmodel"):
        open_checkpoint(tmp_path / "net.pdiparams").__enter__()
    program = json.loads((FILES / "paddle" / "net.json").read_text())
    del program["program"]["regions"][0]["blocks"][0]["ops"][0]
    (tmp_path / "net.json").write_text(json.dumps(program))
    with pytest.raises(CheckpointError, match="of another export"):
        open_checkpoint(tmp_path / "net.pdiparams").__enter__()


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_damage_of_a_program_before_paddle_3_is_said_in_one_line(tmp_path: Path, count: int) -> None:
    (tmp_path / "a").mkdir()
    shutil.copy(FILES / "paddle" / "old.pdiparams", tmp_path / "a" / "net.pdiparams")
    program = (FILES / "paddle" / "old.pdmodel").read_bytes()
    refused = 0
    for changed in flips(program, count, seed=0):
        (tmp_path / "a" / "net.pdmodel").write_bytes(changed)
        refused += is_refused(tmp_path / "a" / "net.pdiparams")
    assert refused > 0


def test_a_gamma_that_mxnet_ignores_is_one_and_stays_where_nothing_tells(tmp_path: Path) -> None:
    shutil.copy(FILES / "mxnet" / "raw-0007.params", tmp_path)
    with open_checkpoint(tmp_path / "raw-0007.params") as checkpoint:
        (layer,) = checkpoint.layers()
        assert "fix_gamma" in checkpoint.notes[0]
    assert layer.weight.tolist() == [5, 5, 5]
    shutil.copy(FILES / "mxnet" / "raw-symbol.json", tmp_path)
    with open_checkpoint(tmp_path / "raw-0007.params") as checkpoint:
        assert checkpoint.layers()[0].weight.tolist() == [1, 1, 1]


def test_mxnet_claims_are_bounded(tmp_path: Path) -> None:
    head = struct.pack("<QQ", 0x112, 0)
    array = struct.pack("<IiI", 0xF993FAC9, 0, 2)
    for content in (
        head + struct.pack("<Q", 2**63),
        head + struct.pack("<Q", 1) + array + struct.pack("<QQiii", 2**40, 2**40, 1, 0, 0),
        head + struct.pack("<Q", 1) + array[:8] + struct.pack("<I", 2**31),
    ):
        (tmp_path / "a.params").write_bytes(content + bytes(64))
        with pytest.raises(CheckpointError, match="damaged"):
            open_checkpoint(tmp_path / "a.params").__enter__()


def caffe2(names: tuple[str, ...], layer: str = "res2_0_branch2a_bn") -> dict[str, np.ndarray]:
    arrays = {f"{layer}_{name}": np.arange(3, dtype="f4") + index for index, name in enumerate(names)}
    return {"conv1_w": np.ones((3, 1, 1, 1), "f4"), **arrays, "lr": np.float32(0.1)}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("names", [("s", "b", "rm", "riv"), ("gamma", "beta", "running_mean", "running_var")])
def test_the_names_of_caffe2_in_pickles_of_detectron(
    tmp_path: Path, names: tuple[str, ...], protocol: int
) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": caffe2(names)}, protocol))
    with open_checkpoint(tmp_path / "a.pkl") as checkpoint:
        (layer,) = checkpoint.layers()
    assert (layer.name, layer.convention.framework, layer.eps) == ("res2_0_branch2a_bn", "Caffe2", None)
    found = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    assert [tensor.tolist() for tensor in found] == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


class PicklerOfPython2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes bytes as the text that they were in Python 2."""

    def save_bytes(self, content: bytes) -> None:
        size = len(content)
        self.write(b"U" + bytes([size]) if size < 256 else b"T" + struct.pack("<I", size))
        self.write(content)
        self.memoize(content)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}  # type: ignore[attr-defined]  # noqa: RUF012


@pytest.mark.parametrize("channels", [3, 64, 4096])
def test_arrays_of_python_2_are_read_wherever_they_lie(tmp_path: Path, channels: int) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"a_bn_{name}": rng.random(channels, dtype="f4") for name in ("s", "b", "rm", "riv")}
    with (tmp_path / "a.pkl").open("wb") as file:
        # longer than all text of a pickle may be
        PicklerOfPython2(file, 2).dump({"blobs": arrays | {"fc_w": np.zeros((4300, 1000))}})
    with open_checkpoint(tmp_path / "a.pkl") as checkpoint:
        (layer,) = checkpoint.layers()
    for found, name in ((layer.running_mean, "rm"), (layer.running_var, "riv"), (layer.weight, "s")):
        assert found.tolist() == arrays[f"a_bn_{name}"].tolist()


def test_statistics_that_detectron_merged_are_said_to_be_lost(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": caffe2(("s", "b"))}, 2))
    with pytest.raises(CheckpointError, match="mean and variance were multiplied into them"):
        open_checkpoint(tmp_path / "a.pkl").__enter__()
