"""Factories as a user writes them, named in tests as own_networks.py:NAME."""

import torch
from torch import Tensor, nn


def small(num_classes: int, dropout: float = 0.0, width: int = 6) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(4 * width, num_classes),
    )


class SkipsLayers(nn.Module):
    """Now and then a layer is left out, so that it has no gradient in that step."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.never = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.head = nn.Conv2d(4, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        if self.training and torch.rand(()) < 0.5:
            features = self.second(features)
        return self.head(self.norm(features) * self.scale).mean((2, 3))


class Explodes(nn.Module):
    """One step in a few, as chance has it, overflows in `unlucky`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = small(num_classes)
        self.unlucky = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        is_bad = self.training and torch.rand(()) < 0.3
        return self.net(self.unlucky(images * float("inf") if is_bad else images))


def without_norm(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 4, stride=8), nn.Flatten(), nn.Linear(64, num_classes))


def deep(num_classes: int) -> nn.Module:
    """The last map is one pixel, so BatchNorm sees one value of each image."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 32), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, num_classes)
    )


def too_deep(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 33), nn.Flatten(), nn.Linear(4, num_classes))


def raises(num_classes: int) -> nn.Module:
    raise ValueError(f"no network\nfor {num_classes}")


def no_module() -> list[int]:
    return [1]


def maps(num_classes: int) -> nn.Module:
    return nn.Conv2d(3, num_classes, 1)


def five_classes() -> nn.Module:
    return small(5)


def lazy(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def untrained(num_classes: int) -> nn.Module:
    return small(num_classes).requires_grad_(False)


class Answers(nn.Module):
    """A dict, in which the scores are called what the caller says."""

    def __init__(self, num_classes: int, key: str = "logits", drop: float = 0.0) -> None:
        super().__init__()
        self.net, self.key = small(num_classes, drop), key

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"images": images, self.key: self.net(images)}


def needs_more(num_classes: int, depth: int) -> nn.Module:
    return small(num_classes, width=depth)
