"""Networks whose BatchNorm lies where folding is hard: see `exported_networks.py`."""

import torch
from torch import Tensor, nn


class Awkward(nn.Module):
    """BatchNorm before, behind and between all that it can be folded into, and one layer that it cannot."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.before_padded = nn.BatchNorm2d(3)
        self.padded = nn.Conv2d(3, 8, 3, padding=1)
        self.after_relu = nn.BatchNorm2d(8)
        self.unpadded = nn.Conv2d(8, 8, 3)
        self.without_weights = nn.BatchNorm2d(8, affine=False)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, bias=False)
        self.of_grouped = nn.BatchNorm2d(12, eps=1e-2)
        self.transposed = nn.ConvTranspose2d(12, 12, 3, stride=2, groups=3, padding=1)
        self.of_transposed = nn.BatchNorm2d(12)
        self.pooled = nn.Conv2d(12, 6, 1)
        self.pool = nn.AvgPool2d(2)
        self.behind_pool = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 7, bias=False)
        self.of_linear = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes)."""
        x = self.padded(self.before_padded(images)).relu()
        x = self.without_weights(self.unpadded(self.after_relu(x)))
        x = self.of_transposed(self.transposed(self.of_grouped(self.grouped(x)).relu())).relu()
        x = self.behind_pool(self.pool(self.pooled(x))).relu().mean((2, 3))
        return self.head(self.of_linear(self.linear(x)).relu())


class FallingActivations(nn.Module):
    """Activations that fall somewhere, behind pooling: what engines move ahead of it is another function."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.first, self.of_first = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.of_second = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes)."""
        x = nn.functional.gelu(self.of_first(self.pool(self.first(images))))
        x = nn.functional.silu(self.pool(self.of_second(self.second(x))))
        return self.head(x.mean((2, 3)))


class SharedConvolution(nn.Module):
    """One convolution with a BatchNorm of its own at each of two places, as in a siamese network."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.head = nn.Linear(6, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes)."""
        one, two = self.first(self.shared(images)), self.second(self.shared(images.flip(3) * 2))
        return self.head(torch.cat([one.relu().mean((2, 3)), two.relu().mean((2, 3))], 1))


class SharedPair(nn.Module):
    """A convolution and its BatchNorm that are used twice together."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, num_classes)."""
        x = self.norm(self.conv(images)).relu()
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))
