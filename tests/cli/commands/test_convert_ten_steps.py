"""Further training after `bncli convert` is that of the framework: ten steps of each, from one file.

The frameworks' own steps were recorded by tests/frameworks/make_*.py.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import Bncli
from tests.frameworks.ten_steps import AFTER, FOLDER, batch

SAID = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
LAYERS = [
    (name, layer) for name, said in SAID.items() for layer in said["layers"] if layer["name"] != "renormed"
]
# what convert says of them: mean and variance go on as they are
ALIKE = {"chainer", "mindspore", "mlx", "tinygrad"}


def converted(
    bncli: Bncli, tmp_path: Path, name: str, layer: dict[str, Any], *more: object
) -> tuple[nn.BatchNorm1d | nn.BatchNorm2d, dict[str, Any]]:
    """PyTorch's layer with the converted state dict, eps and momentum as convert prints them."""
    new = tmp_path / "new.pt"
    new.unlink(missing_ok=True)
    assumed = f"eps={layer['eps']},momentum={layer['momentum']}"  # used where the file has none
    outcome = bncli("convert", FOLDER / SAID[name]["file"], "-o", new, "--assume", assumed, "--json", *more)
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    (told,) = [one for one in document["layers"] if one["name"] == layer["name"]]
    kind = nn.BatchNorm2d if len(layer["shape"]) == 4 else nn.BatchNorm1d
    module = kind(told["num_features"], eps=told["eps"], momentum=told["momentum"])
    prefix = f"{layer['name']}."
    state = torch.load(new, weights_only=True)
    module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return module, {**told, "notes": document["notes"]}


def values_of(layer: dict[str, Any]) -> int:
    """n, of a channel in a batch."""
    return math.prod(layer["shape"]) // int(layer["shape"][1])


@pytest.mark.parametrize(("name", "layer"), LAYERS, ids=[f"{name}-{layer['name']}" for name, layer in LAYERS])
def test_ten_steps_of_pytorch_give_the_statistics_of_the_framework(
    bncli: Bncli, tmp_path: Path, name: str, layer: dict[str, Any]
) -> None:
    n = values_of(layer)
    module, told = converted(bncli, tmp_path, name, layer)
    assert (told["eps"], told["momentum"]) == pytest.approx((layer["eps"], layer["momentum"]))
    assert (name in ALIKE) == (not told["notes"])
    biased = {
        "biased": True,
        "biased or unbiased": name == "onnx",  # whose operator averages biased ones
        "unbiased for images": len(layer["shape"]) == 2,
        "unbiased": False,
    }[told["variance"]]
    if biased:  # what is said then
        module, told = converted(bncli, tmp_path, name, layer, "--values-per-channel", n)
    assert (told["next_momentum"] is not None) == ("young" in name)
    calls = told["num_batches_tracked"]
    for step in AFTER:
        if told["next_momentum"] is not None:  # of an average that is divided, as is said
            module.momentum = layer["momentum"] / (1 - (1 - layer["momentum"]) ** (calls + step + 1))
            if step == 0:
                assert module.momentum == pytest.approx(told["next_momentum"])
        module(torch.from_numpy(batch(step, layer["shape"])))
    assert module.running_mean is not None
    assert module.running_var is not None
    variance = module.running_var * (n - 1) / n if biased else module.running_var
    torch.testing.assert_close(module.running_mean, torch.tensor(layer["running_mean"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance, torch.tensor(layer["running_var"]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["keras", "tf_keras"])
def test_batch_renormalisation_goes_on_with_its_mean_alone(bncli: Bncli, tmp_path: Path, name: str) -> None:
    """Its variance is the square of an averaged deviation, which PyTorch has not; convert says so."""
    (layer,) = [layer for layer in SAID[name]["layers"] if layer["name"] == "renormed"]
    module, _ = converted(bncli, tmp_path, name, layer)
    assert module.running_mean is not None
    assert module.running_var is not None
    m, eps = layer["momentum"], layer["eps"]
    deviation = (module.running_var.double() + eps).sqrt()
    for step in AFTER:
        x = torch.from_numpy(batch(step, layer["shape"]))
        module(x)
        deviation = (1 - m) * deviation + m * (x.double().var(0, correction=0) + eps).sqrt()
    torch.testing.assert_close(module.running_mean, torch.tensor(layer["running_mean"]), rtol=1e-5, atol=1e-6)
    expected = torch.tensor(layer["running_var"], dtype=torch.float64)
    torch.testing.assert_close(deviation.square() - eps, expected, rtol=1e-5, atol=0)
    assert not torch.allclose(module.running_var.double(), expected, rtol=1e-2)
