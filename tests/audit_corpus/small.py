"""Small networks for the cases that are about what was done to a network, not about which one it is."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.audit_corpus.learning import NUM_CLASSES, pictures, seeded, train

SIZE = 16  # pixels


class Block(nn.Module):
    """Two convolutions and a shortcut, as in ResNet."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.short = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, values: Tensor) -> Tensor:
        """(N, inner, H, W) to (N, outer, H / stride, W / stride)."""
        inside = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(values)))))
        return F.relu(inside + self.short(values))


class SmallResNet(nn.Module):
    """Ten BatchNorm layers of 12 to 48 channels, for images of 16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.blocks = nn.Sequential(Block(12, 12, 1), Block(12, 24, 2), Block(24, 48, 2))
        self.head = nn.Linear(48, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, 16, 16) to logits."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def set_norm(model: nn.Module, **options: object) -> nn.Module:
    """Change hyperparameters of every BatchNorm layer, such as momentum or eps."""
    for layer in norms(model):
        for name, value in options.items():
            setattr(layer, name, value)
    return model


def norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Its BatchNorm layers."""
    return [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def small_resnet() -> nn.Module:
    """A fresh one, in train mode, of the current seed."""
    return SmallResNet().train()


@seeded
def trained() -> nn.Module:
    """300 steps, momentum 0.1: three quarters right."""
    return train(small_resnet(), 300)


@seeded
def trained_on() -> nn.Module:
    """The same for 50 steps more, on other batches."""
    return train(trained(), 50, learning_rate=0.01, seed=7)


def track(model: nn.Module, inputs: list[Tensor]) -> nn.Module:
    """Forward passes in train mode without learning: only the running statistics follow."""
    model.train()
    with torch.no_grad():
        for images in inputs:
            model(images)
    return model


def noise(num: int, *shape: int) -> list[Tensor]:
    """Batches as in the issue: normal, mean 1, deviation 3."""
    return [torch.randn(*shape) * 3 + 1 for _ in range(num)]


def convolution_and_norm(**options: object) -> nn.Sequential:
    """The issue's network: a convolution and a BatchNorm."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options)).train()  # type: ignore[arg-type]


def accuracy(model: nn.Module) -> float:
    """In eval mode, on training images."""
    images, labels = pictures(SIZE)
    with torch.no_grad():
        return float((model.eval()(images[:500]).argmax(1) == labels[:500]).double().mean())


Build = Callable[[], nn.Module]
