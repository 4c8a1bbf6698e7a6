"""The network of resnet18.yaml: torchvision's ResNet-18, with a beginning for images of 32x32 pixels."""

import torchvision
from torch import nn


def resnet18(num_classes: int) -> nn.Module:
    """Images (N, 3, 32, 32) to logits (N, num_classes).

    Its own beginning, a 7x7 convolution of stride 2 and pooling, would leave 8x8 pixels to the first block.
    """
    network = torchvision.models.resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network
