"""Whole networks between Keras and PyTorch, with Keras' own outputs and names of variables as the oracle.

tests/frameworks/make_keras.py made the files; tests/frameworks/check_resnet50.py does it with the real
ResNet-50 and the real Keras, both ways.
"""

import json
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bncli.checkpoints.convert_network import LAYOUTS
from bncli.checkpoints.resnet_names import haiku_names, keras_names
from bncli.models import build_network
from tests.checkpoints.formats.framework_answers import input_of
from tests.conftest import Bncli
from tests.frameworks import keras_twins
from tests.frameworks.recorded import FILES

FOLDER = FILES / "keras_networks"
ANSWERS = json.loads((FOLDER / "answers.json").read_text())
TWINS = Path(keras_twins.__file__)
CLASSES = {"resnet": "ResNet", "mixed": "Mixed", "halved": "Halved"}


def converted(bncli: Bncli, tmp_path: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Keras' file as a state dict, and what is said of it."""
    new = tmp_path / f"{name}.pt"
    twin = f"{TWINS}:{CLASSES[name]}"
    outcome = bncli("convert", FOLDER / f"{name}.keras", "-o", new, "--model", twin, "--json")
    assert outcome.code == 0, outcome.err
    return new, json.loads(outcome.out)


def output(network: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        images: torch.Tensor = network(input_of(ANSWERS[name]["shape"]).permute(0, 3, 1, 2))
    return images


@pytest.mark.parametrize("name", ["resnet", "mixed"])
def test_a_whole_network_computes_in_pytorch_what_it_computes_in_keras(
    bncli: Bncli, tmp_path: Path, name: str
) -> None:
    new, said = converted(bncli, tmp_path, name)
    network: Any = getattr(keras_twins, CLASSES[name])().eval()
    network.load_state_dict(torch.load(new, weights_only=True), strict=True)
    eps = {layer["name"]: layer["eps"] for layer in said["layers"]}
    for layer, module in network.named_modules():
        module.eps = eps.get(layer, 0)
    expected = torch.tensor(ANSWERS[name]["output"])
    close = {"rtol": 1e-5, "atol": 1e-5 * float(expected.abs().max())}
    assert (said["tensors_left_out"], said["tensors_missing"]) == ([], [])
    if name == "resnet":  # what is said of the strides
        assert not torch.allclose(output(network, name), expected, **close)
        assert any(
            "Keras 3 has other strides: outputs differ until these are set: layer2.0.conv1.stride (2, 2),"
            " layer2.0.conv2.stride (1, 1)." in note
            for note in said["notes"]
        )
        network.layer2[0].conv1.stride, network.layer2[0].conv2.stride = (2, 2), (1, 1)
    torch.testing.assert_close(output(network, name), expected, **close)


def test_zeros_around_images_are_compared_and_what_is_said_of_them_makes_outputs_equal(
    bncli: Bncli, tmp_path: Path
) -> None:
    new, said = converted(bncli, tmp_path, "halved")
    network: Any = keras_twins.Halved().eval()
    network.load_state_dict(torch.load(new, weights_only=True), strict=True)
    for norm in (network.images[1], network.images[4]):
        norm.eps = 1e-3
    expected = torch.tensor(ANSWERS["halved"]["output"])
    close = {"rtol": 1e-5, "atol": 1e-5 * float(expected.abs().max())}
    assert not torch.allclose(output(network, "halved"), expected, **close)
    assert [note for note in said["notes"] if "pads" in note] == [
        "Keras 3 pads in another way: outputs differ until padding is 0 behind nn.ZeroPad2d((0, 1, 0, 1)) in"
        " images.0, images.3."
    ]
    for index in (0, 3):
        network.images[index].padding = (0, 0)
        network.images[index] = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), network.images[index])
    torch.testing.assert_close(output(network, "halved"), expected, **close)
    # the same network again, built as it was said: there is nothing to say
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom tests.frameworks.keras_twins import Halved\n"
        "def make():\n    net = Halved()\n    for i in (0, 3):\n        net.images[i].padding = (0, 0)\n"
        "        net.images[i] = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), net.images[i])\n    return net\n"
    )
    model = ("--model", f"{tmp_path / 'net.py'}:make")
    outcome = bncli("convert", FOLDER / "halved.keras", "-o", tmp_path / "again.pt", *model, "--json")
    assert not any("pads" in note or "strides" in note for note in json.loads(outcome.out)["notes"])


@pytest.mark.parametrize("name", ["resnet", "mixed"])
def test_back_in_keras_are_its_own_variables(bncli: Bncli, tmp_path: Path, name: str) -> None:
    state, _ = converted(bncli, tmp_path, name)
    back, twin = tmp_path / "back.npz", f"{TWINS}:{CLASSES[name]}"
    outcome = bncli("convert", state, "-o", back, "--to", "keras", "--model", twin, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["tensors_left_out"] == []
    text = " ".join(bncli("convert", state, "-o", back, "--to", "keras", "--model", twin).out.split())
    kept = torch.load(state, weights_only=True)
    others = [key for key in kept if f"{key.rpartition('.')[0]}.running_mean" not in kept]
    assert f" and {len(others)} other tensors of PyTorch" in text
    if name == "mixed":
        assert "1 bias of 0 added, as Keras' layers have one unless use_bias=False: images.0." in text
    with np.load(back) as arrays:
        shapes = {key: list(arrays[key].shape) for key in arrays.files}
    if name == "mixed":  # whose layers keep the names of PyTorch's
        own = {
            "c": "images.0", "n": "images.1", "d": "images.3", "t": "images.5", "m": "images.6",
            "flat": "flat", "first": "classify.0", "last": "classify.2",
        }  # fmt: skip
        expected = {
            f"{own[key.partition('/')[0]]}/{key.partition('/')[2]}": shape
            for key, shape in ANSWERS[name]["variables"].items()
        }
        expected["images.5/bias"] = [3]  # of 0, which Keras' layer has not
    else:
        expected = ANSWERS[name]["variables"]
    assert shapes == expected
    with np.load(back) as arrays:  # the same numbers at the same places, by the formula for each kind
        kept = torch.load(state, weights_only=True)
        for key in arrays.files:
            if name == "mixed" and key.startswith("classify.0/kernel"):
                flat = kept["classify.0.weight"].reshape(7, 3, 16)
                assert np.array_equal(arrays[key], flat.permute(2, 1, 0).reshape(48, 7).numpy())
            if name == "mixed" and key == "images.3/kernel":
                weight = kept["images.3.weight"].reshape(4, 2, 2, 2)
                assert np.array_equal(arrays[key], weight.permute(2, 3, 0, 1).numpy())
            if name == "resnet" and key == "conv2_block1_0_conv/kernel":
                weight = kept["layer1.0.downsample.0.weight"]
                assert np.array_equal(arrays[key], weight.permute(2, 3, 1, 0).numpy())


@pytest.mark.parametrize("name", ["resnet", "mixed"])
def test_what_was_written_for_keras_is_read_as_keras_and_converted_back(
    bncli: Bncli, tmp_path: Path, name: str
) -> None:
    state, _ = converted(bncli, tmp_path, name)
    there, back, twin = tmp_path / "there.npz", tmp_path / "back.pt", f"{TWINS}:{CLASSES[name]}"
    assert bncli("convert", state, "-o", there, "--to", "keras", "--model", twin).code == 0
    shown = bncli("inspect-stats", there, "--json", "--fail-on", "never").json["layers"]
    assert {layer["framework"] for layer in shown} == {"Keras 3"}
    said = bncli("compare", state, there, "--json").json
    assert said["frameworks"] == ["PyTorch", "Keras 3"]
    assert bncli("convert", there, "-o", back, "--model", twin).code == 0
    before, after = (torch.load(path, weights_only=True) for path in (state, back))
    assert after.keys() == before.keys()
    for key in before:
        if not key.endswith("num_batches_tracked"):  # Keras has no such counter
            assert torch.equal(after[key], before[key]), key


def test_biased_variances_for_keras_and_the_lines_that_load_them(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    plain, biased = tmp_path / "plain.npz", tmp_path / "biased.npz"
    outcome = bncli("convert", finished_run / "last.pt", "-o", plain, "--to", "keras")
    assert outcome.code == 0, outcome.err
    assert f'saved = numpy.load("{plain}")' in outcome.out
    assert "momentum=0.9)" in outcome.out.replace("\n", " ")
    options = ("--to", "keras", "--values-per-channel", "64")
    assert bncli("convert", finished_run / "last.pt", "-o", biased, *options).code == 0
    with np.load(plain) as one, np.load(biased) as two:
        assert one.files == two.files
        for key in one.files:
            factor = 63 / 64 if key.endswith("moving_variance") else 1
            np.testing.assert_allclose(two[key], one[key] * factor, rtol=1e-6)


def test_what_does_not_map_one_to_one_is_listed(bncli: Bncli, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom tests.frameworks.keras_twins import Mixed\n"
        "def make():\n    net = Mixed()\n    net.classify = nn.Linear(48, 2)\n    return net\n"
    )
    new, network = tmp_path / "new.pt", f"{tmp_path / 'net.py'}:make"
    outcome = bncli("convert", FOLDER / "mixed.keras", "-o", new, "--model", network, "--json")
    assert outcome.code == 0, outcome.err
    said = json.loads(outcome.out)
    assert any("BatchNorm layers alone" in note for note in said["notes"])
    assert "first.0" in said["tensors_left_out"]
    assert said["tensors_missing"] == [
        "images.0.weight", "images.3.weight", "images.3.bias", "images.5.weight", "images.5.bias",
        "classify.weight", "classify.bias",
    ]  # fmt: skip


def test_a_bias_with_no_batch_norm_behind_it_is_left_out(bncli: Bncli, tmp_path: Path) -> None:
    """It has no place where the network's convolution has none, and nothing behind takes it."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom tests.frameworks.keras_twins import Mixed\n"
        "def make():\n    net = Mixed()\n    net.images[3] = nn.Conv2d(4, 8, 2, groups=4, bias=False)\n"
        "    return net\n"
    )
    new, network = tmp_path / "new.pt", f"{tmp_path / 'net.py'}:make"
    outcome = bncli("convert", FOLDER / "mixed.keras", "-o", new, "--model", network, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["tensors_left_out"] == ["d.1"]


def test_resnet_18_has_no_twin_among_keras_applications() -> None:
    with torch.device("meta"):
        networks = {name: build_network(f"torchvision:{name}", {}) for name in ("resnet18", "resnet50")}
    found = {
        name: keras_names([layer for layer, part in network.named_modules() if list(part.parameters(False))])
        for name, network in networks.items()
    }
    assert found["resnet18"] is None
    assert found["resnet50"] is not None
    assert len(set(found["resnet50"].values())) == 53 + 53 + 1
    assert found["resnet50"]["layer4.2.bn3"] == "conv5_block3_3_bn"


@pytest.mark.parametrize("file", ["linen.msgpack", "nnx.msgpack"])
def test_a_resnet_of_flax_computes_in_pytorch_what_it_computes_in_flax(
    bncli: Bncli, tmp_path: Path, file: str
) -> None:
    """Linen's names are those of Flax' ImageNet example, nnx' are torchvision's, padding included."""
    with zipfile.ZipFile(FILES / "jax_networks" / "files.zip") as archive:
        archive.extract(file, tmp_path)
    answer = json.loads((FILES / "jax_networks" / "answers.json").read_text())[file]
    new = tmp_path / "new.pt"
    outcome = bncli("convert", tmp_path / file, "-o", new, "--model", f"{TWINS}:ResNet", "--json")
    assert outcome.code == 0, outcome.err
    said = json.loads(outcome.out)
    assert (said["tensors_left_out"], said["tensors_missing"]) == ([], [])
    network: Any = keras_twins.ResNet().eval()
    network.load_state_dict(torch.load(new, weights_only=True), strict=True)
    expected = torch.tensor(answer["output"])
    images = input_of(answer["shape"]).permute(0, 3, 1, 2)
    close = {"rtol": 1e-5, "atol": 1e-5 * float(expected.abs().max())}
    pads = [note for note in said["notes"] if "pads" in note]
    if file == "linen.msgpack":
        assert pads == [
            "Flax's ImageNet example pads in another way: outputs differ until padding is 0 behind"
            " nn.ZeroPad2d((0, 1, 0, 1)) in layer2.0.conv2."
        ]
        with torch.no_grad():
            assert not torch.allclose(network(images), expected, **close)
        block, zeros = network.layer2[0], nn.ZeroPad2d((0, 1, 0, 1))
        block.conv2.padding = (0, 0)
        block.conv2 = nn.Sequential(zeros, block.conv2)
        network.maxpool = nn.Sequential(zeros, nn.MaxPool2d(3, 2))
    else:
        assert pads == []
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected, **close)


def test_a_network_of_paddle_with_the_same_names_is_converted_whole(bncli: Bncli, tmp_path: Path) -> None:
    """As its own ResNet has them, whose file is a pickle of arrays; its linear weights are (in, out)."""
    network = keras_twins.ResNet()
    for norm in (part for part in network.modules() if isinstance(part, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    state = {name: one for name, one in network.state_dict().items() if not name.endswith("tracked")}
    arrays = {
        name.replace("running_mean", "_mean").replace("running_var", "_variance"): one.numpy()
        for name, one in (state | {"fc.weight": state["fc.weight"].T}).items()
    }
    (tmp_path / "net.pdparams").write_bytes(pickle.dumps(arrays, protocol=4))
    new = tmp_path / "new.pt"
    outcome = bncli("convert", tmp_path / "net.pdparams", "-o", new, "--model", f"{TWINS}:ResNet")
    assert outcome.code == 0, outcome.err
    found = torch.load(new, weights_only=True)
    assert found.keys() == network.state_dict().keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def test_names_of_haiku_s_resnets() -> None:
    """As hk.nets.ResNet50 and ResNet18 call them below their own name."""
    with torch.device("meta"):
        networks = {name: build_network(f"torchvision:{name}", {}) for name in ("resnet18", "resnet50")}
    for name, network in networks.items():
        known = haiku_names(
            [layer for layer, part in network.named_modules() if list(part.parameters(False))]
        )
        assert known is not None
        assert len(set(known.values())) == len(known) == {"resnet18": 41, "resnet50": 107}[name]
        assert known["layer1.0.conv2"] == "block_group_0/~/block_0/~/conv_1"
        assert known["layer2.0.downsample.0"] == "block_group_1/~/block_0/~/shortcut_conv"
        assert known["layer4.1.bn2"] == "block_group_3/~/block_1/~/batchnorm_1"
        assert known["fc"] == "logits"
    with torch.device("meta"):
        vgg = build_network("torchvision:vgg11_bn", {})
    assert haiku_names([name for name, _ in vgg.named_modules()]) is None


def test_help_and_explanation_name_the_frameworks_whose_networks_are_converted(bncli: Bncli) -> None:
    """By their families: Keras 2 and 3 are one."""
    families = {convention.framework.lower().split()[0].removeprefix("tf.") for convention in LAYOUTS}
    for command in (("convert", "--help"), ("explain", "conversion")):
        text = " ".join(bncli(*command).out.split()).lower()
        sentence = text[: text.index("for pytorch, ")].rpartition("--model")[2]
        named = set(re.findall("keras|flax|haiku|paddlepaddle|mxnet|equinox|chainer|mindspore", sentence))
        assert named == families


def test_a_network_for_keras_is_one_of_pytorch(bncli: Bncli, tmp_path: Path) -> None:
    twin = ("--to", "keras", "--model", f"{TWINS}:Mixed")
    outcome = bncli("convert", FOLDER / "mixed.keras", "-o", tmp_path / "new.npz", *twin)
    assert outcome.code == 2
    assert "--model: with --to keras it goes with a checkpoint of PyTorch" in outcome.err


def test_the_lines_that_load_it_do_so(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    """They are run as they are printed, with a stand-in for a network of Keras."""
    new = tmp_path / "new.npz"
    outcome = bncli("convert", finished_run / "last.pt", "-o", new, "--to", "keras")
    lines = [line.removeprefix("    ") for line in outcome.out.splitlines() if line.startswith("    ")]
    state = torch.load(finished_run / "last.pt", weights_only=True)["state_dict"]
    names = [key.removesuffix(".running_mean") for key in state if key.endswith(".running_mean")]

    class Variable:
        def __init__(self, name: str) -> None:
            self.name = name

        def assign(self, value: Any) -> None:
            self.value = value

    class Layer:
        def __init__(self, name: str) -> None:
            self.name = name
            self.weights = [Variable(one) for one in ("gamma", "beta", "moving_mean", "moving_variance")]

    class Convolution:
        name, weights = "conv", (Variable("kernel"),)

    model = SimpleNamespace(layers=[Convolution(), *map(Layer, names)])
    keras = SimpleNamespace(layers=SimpleNamespace(BatchNormalization=Layer))
    exec("\n".join(lines), {"numpy": np, "model": model, "keras": keras})
    for layer in model.layers[1:]:
        for variable, leaf in zip(
            layer.weights, ("weight", "bias", "running_mean", "running_var"), strict=True
        ):
            assert np.array_equal(variable.value, state[f"{layer.name}.{leaf}"].numpy())


def test_for_keras_the_file_is_an_npz(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    outcome = bncli("convert", finished_run / "last.pt", "-o", tmp_path / "new.pt", "--to", "keras")
    assert outcome.code == 2
    assert "for Keras a name that ends in .npz" in outcome.err
