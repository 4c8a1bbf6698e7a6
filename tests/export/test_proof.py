"""What the comparison of a file with its network is called."""

import pytest
import torch
from torch import nn

from bncli.export.proof import prove


class Offset(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) + self.by


@pytest.mark.parametrize(
    ("by", "verdict"),
    [
        (0.0, "The file computes what the checkpoint does, to the bit."),
        (1e-6, "The file computes what the checkpoint does, but for rounding."),
        (0.1, "The file does NOT compute what the checkpoint does: an output differs by 0.1 of the largest"),
    ],
)
def test_the_verdict_is_by_the_largest_difference(by: float, verdict: str) -> None:
    images = torch.ones(3, 1, 1, 4)
    found = prove(Offset(0), Offset(by), images, engine="none", what="the test", tolerance=1e-3)
    assert found.verdict.startswith(verdict)
