"""Networks that are hard on whoever measures their BatchNorm layers."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A shortcut with a BatchNorm of its own, computed after the main path, and an in-place sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.short = nn.Conv2d(3, 6, 1)
        self.bn3 = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)
        self.bn4 = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(self.drop(y)))
        y += self.bn3(self.short(x))
        return self.bn4(self.head(y.relu_().mean((2, 3))))


class Shared(nn.Module):
    """One layer used twice: the second time on what came out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.after = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(self.bn0(x)))
        x = self.bn(self.conv(x.relu()))
        return self.after(self.conv(x))


class Twins(nn.Module):
    """One layer used on two inputs that do not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.after = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.bn(self.one(x)).mean((2, 3), keepdim=True) + self.bn(input=self.two(x)))


def mixed() -> nn.Sequential:
    """3-D, 2-D and 1-D inputs of both kinds, SyncBatchNorm, and a layer without running statistics."""
    return nn.Sequential(
        nn.BatchNorm3d(2),
        nn.Flatten(2),
        nn.SyncBatchNorm(2),
        nn.Conv1d(2, 4, 3),
        nn.BatchNorm1d(4),
        nn.Dropout(0.5),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.Flatten(),
        nn.LazyLinear(5),
        nn.BatchNorm1d(5, momentum=None),
    )
