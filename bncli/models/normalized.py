"""Pixels as a network was trained to see them: a network that takes raw images then."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bncli.models.convnet import Normalize

# mean and deviation of each channel, in units of the full range (0..1)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of torchvision's weights and most of timm's
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # pixels from -1 to 1
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # pixels from 0 to 1
NAMED = {"imagenet": IMAGENET, "half": HALF, "none": NONE}


def normalize_input(
    network: nn.Module, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> None:
    """Let a network on `device` take images (N, 3, H, W), uint8 in 0..255 or floating point in 0..1.

    It is a hook, no module around the network: so the layers keep their names.
    """
    normalize = Normalize(mean, std).to(device)

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (normalize(inputs[0]), *inputs[1:])

    network.register_forward_pre_hook(before)
