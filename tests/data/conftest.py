import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bncli.data import Split

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def real_cifar10() -> Path:
    root = Path(os.environ.get("BNCLI_CIFAR10_ROOT") or REPOSITORY / ".." / "shared" / "data")
    if not (root / "cifar-10-batches-py" / "batches.meta").is_file():
        pytest.skip(f"the real CIFAR-10 is not at {root}; set BNCLI_CIFAR10_ROOT to its folder")
    return root


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def numbered_split() -> Split:
    """103 images of 8x8, each of one value, which is also its label."""
    labels = torch.arange(103)
    return Split(labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous(), labels)
