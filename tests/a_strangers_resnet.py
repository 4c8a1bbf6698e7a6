"""Writes the `model.pt` of the README: a network that somebody else trained, with one fault.

python -m tests.a_strangers_resnet model.pt
"""

import sys
from pathlib import Path

import torch

from bncli.torchvision_compat import import_torchvision


def write(path: Path) -> None:
    """torchvision's ResNet-18 after 60 training batches, with an overflow of float16 in one layer."""
    models = import_torchvision().models
    torch.manual_seed(0)
    model = models.resnet18(num_classes=10)
    model.train()
    with torch.no_grad():
        for _ in range(60):
            model(torch.randn(16, 3, 32, 32))
    model.layer3[1].bn2.running_var[[7, 90, 201]] = float("nan")
    torch.save(model.state_dict(), path)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
