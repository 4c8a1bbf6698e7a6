"""The networks of files/keras_networks written for PyTorch, with torchvision's names and strides."""

from torch import Tensor, nn

from bncli.torchvision_compat import import_torchvision

Bottleneck = import_torchvision().models.resnet.Bottleneck


def stage(inputs: int, width: int, stride: int) -> nn.Sequential:
    """Two blocks, the first with a shortcut of its own."""
    shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
    return nn.Sequential(Bottleneck(inputs, width, stride, shortcut), Bottleneck(4 * width, width))


class ResNet(nn.Module):
    """Torchvision's ResNet-50 with two stages and few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = stage(64, 2, 1)
        self.layer2 = stage(8, 3, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(x.flatten(1))


class Halved(nn.Module):
    """A network that halves images, padded alike on all sides."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, 2, 1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 5, 3, padding="same"), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.images(x))


class Mixed(nn.Module):
    """All kinds of kernels, and BatchNorm and a linear layer behind images that were laid flat."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Sequential(
            nn.Conv2d(3, 4, 25, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 8, 2, groups=4), nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 2), nn.BatchNorm2d(3),
        )  # fmt: skip
        self.flat = nn.BatchNorm1d(48)
        self.classify = nn.Sequential(nn.Linear(48, 7), nn.ReLU(), nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.flat(self.images(x).flatten(1)))
