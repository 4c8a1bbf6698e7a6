"""PaddlePaddle's ResNet-50 and MobileNetV2 through `bncli convert` into torchvision's. Outside the suite.

    python3 -m venv /tmp/paddle
    /tmp/paddle/bin/pip install paddlepaddle==3.3.1 . torchvision
    /tmp/paddle/bin/python -m tests.frameworks.check_paddle_networks

They have the names and the padding of torchvision's, get random numbers, and both compute the same images.
"""

import tempfile
from pathlib import Path

import numpy as np
import paddle
import torch

from bncli.cli.app import main as bncli
from bncli.models import build_network


def main() -> None:
    """Convert, load and compute."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(2, 3, 224, 224)).astype("f4")
    for name in ("resnet50", "mobilenet_v2"):
        model = getattr(paddle.vision.models, name)()
        model.eval()
        for key, value in model.state_dict().items():
            leaf = key.rpartition(".")[2]
            scales = (0.5, 1.5) if leaf == "weight" and value.ndim == 1 else (-0.05, 0.05)
            low, high = {"_mean": (-0.3, 0.3), "_variance": (0.5, 2)}.get(leaf, scales)
            value.set_value(generator.uniform(low, high, value.shape).astype("f4"))
        expected = model(paddle.to_tensor(images)).numpy()
        with tempfile.TemporaryDirectory() as folder:
            path, target = Path(folder) / f"{name}.pdparams", Path(folder) / f"{name}.pt"
            paddle.save(model.state_dict(), str(path))
            assert bncli(["convert", str(path), "-o", str(target), "--model", f"torchvision:{name}"]) == 0
            network = build_network(f"torchvision:{name}", {}).eval()
            network.load_state_dict(torch.load(target, weights_only=True), strict=True)
        with torch.no_grad():
            found = network(torch.from_numpy(images)).numpy()
        off = float(np.abs(found - expected).max() / np.abs(expected).max())
        print(f"{name}: outputs differ by {off:.1e} of the largest")
        assert off < 1e-5


if __name__ == "__main__":
    main()
