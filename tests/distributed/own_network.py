"""A network in which everything is there that running statistics of several processes could get wrong."""

import torch
from torch import Tensor, nn


class Awkward(nn.Module):
    """A layer used twice, a cumulative one, a frozen one, dropout, and weights that no step uses."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.BatchNorm2d(8, momentum=0.2)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.cumulative = nn.BatchNorm2d(8, momentum=None)
        self.frozen = nn.BatchNorm2d(8)
        self.untracked = nn.BatchNorm2d(8, track_running_stats=False)
        self.dropout = nn.Dropout(0.2)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(8, num_classes)
        with torch.no_grad():
            self.frozen.running_mean.uniform_(-1, 1)
            self.frozen.running_var.uniform_(0.5, 2)

    def train(self, mode: bool = True) -> "Awkward":
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.twice(self.first(images)))
        features = torch.relu(self.twice(self.again(features)))
        features = self.frozen(self.cumulative(features))
        features = self.dropout(self.untracked(nn.functional.avg_pool2d(features, 4)))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class Counting(nn.Module):
    """A buffer that follows what this process has seen, as those of vector quantisation do."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, num_classes)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen += images.float().mean()
        logits: Tensor = self.head(self.norm(images).mean((2, 3)))
        return logits


def counting(num_classes: int) -> nn.Module:
    """The same."""
    return Counting(num_classes)


def awkward(num_classes: int) -> nn.Module:
    """Made by name, as users name networks."""
    return Awkward(num_classes)
