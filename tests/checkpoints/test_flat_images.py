"""Images that are laid flat, seen without computing: against the sizes that PyTorch itself has."""

import pytest
import torch
from torch import Tensor, nn

from bncli.checkpoints.flat_images import flat_pixels
from bncli.models import build_network


class Views(nn.Module):
    """Lays flat in a way of its own, and pools before a second linear layer."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, stride=8), nn.BatchNorm1d(64)
        self.flat, self.pooled = nn.Linear(64, 5), nn.Linear(4, 5)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_max_pool2d(self.conv(x), 4)
        ways = {
            "flatten": lambda: x.flatten(1),
            "view": lambda: x.view(x.size(0), -1),
            "reshape": lambda: torch.reshape(x, (len(x), -1)),
        }
        return self.flat(self.norm(ways[self.way]()).relu()) + self.pooled(x.mean((2, 3)))


@pytest.mark.parametrize("way", ["flatten", "view", "reshape"])
def test_what_takes_flat_images_and_how_many_pixels_they_had(way: str) -> None:
    network = Views(way)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert flat_pixels(network) == {"norm": 16, "flat": 16}
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision:vgg11_bn", {"classifier.0": 49}),
        ("torchvision:densenet121", {}),  # whose last convolution has a number of channels that divides
        ("torchvision:mobilenet_v3_small", {}),
    ],
)
def test_networks_of_torchvision(name: str, expected: dict[str, int]) -> None:
    with torch.device("meta"):
        network = build_network(name, {})
    assert flat_pixels(network) == expected


def test_a_network_that_no_image_runs_through_is_not_known() -> None:
    class Picky(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            raise ValueError("no")

    assert flat_pixels(nn.Sequential(Picky(3, 4, 1))) is None
