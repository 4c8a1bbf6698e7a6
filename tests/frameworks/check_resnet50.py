"""The real ResNet-50 of Keras and of torchvision through `bncli convert`, both ways. Outside the suite.

    python3 -m venv /tmp/keras && /tmp/keras/bin/pip install keras==3.15.1 tensorflow-cpu==2.21.0 . pyfive
    /tmp/keras/bin/python -m tests.frameworks.check_resnet50

Both are built without weights and given random ones; then each computes with the other's. What has to be set
is done as the command says it: eps, and which convolutions halve the images.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import torch
from torch import nn

from bncli.cli.app import main as bncli
from bncli.models import build_network

L = keras.layers
NAME = "torchvision:resnet50"
HALVED = {f"conv{stage}_block1_1_conv" for stage in (3, 4, 5)}
PADDED = {f"conv{stage}_block1_2_conv" for stage in (3, 4, 5)}


class Padded(L.Conv2D):
    """A convolution that pads one row and column on each side, as PyTorch's does."""

    def call(self, x: Any) -> Any:
        return super().call(keras.ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))

    def compute_output_spec(self, x: Any) -> Any:
        count, height, width, channels = x.shape
        return keras.KerasTensor(self.compute_output_shape((count, height + 2, width + 2, channels)))


def as_torchvision(layer: Any) -> Any:
    """A layer of Keras' ResNet-50 as torchvision's has it."""
    config = layer.get_config()
    if layer.name in HALVED:
        config["strides"] = (1, 1)
    if layer.name in PADDED:
        return Padded.from_config({**config, "strides": (2, 2), "padding": "valid"})
    if isinstance(layer, L.BatchNormalization):
        config["epsilon"] = 1e-5
    return type(layer).from_config(config)


def difference(one: Any, two: Any) -> float:
    """The largest, relative to the largest number."""
    return float(np.abs(one - two).max() / np.abs(two).max())


def main() -> None:
    """Convert both ways, and compare outputs."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(2, 224, 224, 3)).astype("f4")
    model = keras.applications.ResNet50(weights=None, classifier_activation=None)
    network = build_network(NAME, {}).eval()
    between = {
        "gamma": (0.5, 1.5),
        "beta": (-0.3, 0.3),
        "moving_mean": (-0.3, 0.3),
        "moving_variance": (0.5, 2),
    }
    for variable in model.weights:
        low, high = between.get(variable.name, (-0.05, 0.05))
        variable.assign(generator.uniform(low, high, variable.shape))
    of_keras = model.predict(images, verbose=0)
    given = torch.from_numpy(images).permute(0, 3, 1, 2)
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        for tensor, (low, high) in zip(
            (norm.weight, norm.bias, norm.running_mean, norm.running_var), between.values(), strict=True
        ):
            nn.init.uniform_(tensor, low, high)
    with torch.no_grad():
        of_torchvision = network(given).numpy()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(network.state_dict(), folder / "torchvision.pt")
        for source in ("new.keras", "new.weights.h5"):
            (model.save if source == "new.keras" else model.save_weights)(folder / source)
            target = folder / f"{source}.pt"
            assert bncli(["convert", str(folder / source), "-o", str(target), "--model", NAME]) == 0
            network.load_state_dict(torch.load(target, weights_only=True))
            for norm in norms:
                norm.eps = 1.001e-5
            for stage in (network.layer2, network.layer3, network.layer4):
                stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
            with torch.no_grad():
                off = difference(network(given).numpy(), of_keras)
            print(f"{source} in torchvision: outputs differ by {off:.1e} of the largest")
            assert off < 1e-5
        arrays = folder / "new.npz"
        command = ["convert", str(folder / "torchvision.pt"), "-o", str(arrays), "--to", "keras"]
        assert bncli([*command, "--model", NAME]) == 0
        rebuilt = keras.models.clone_model(model, clone_function=as_torchvision)
        saved = np.load(arrays)
        for layer in rebuilt.layers:
            for variable in layer.weights:
                variable.assign(saved[f"{layer.name}/{variable.name}"])
        off = difference(rebuilt.predict(images, verbose=0), of_torchvision)
        print(f"torchvision's in Keras: outputs differ by {off:.1e} of the largest")
        assert off < 1e-5


if __name__ == "__main__":
    main()
