"""Pixels as a network was trained to see them: a network that takes raw images then."""

import copy
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
    network.register_forward_pre_hook(_NormalizeInput(Normalize(mean, std).to(device)))


def input_normalization(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The mean and deviation of each channel that `normalize_input` gave a network; None: it did not."""
    hooks = [hook for hook in network._forward_pre_hooks.values() if isinstance(hook, _NormalizeInput)]
    return hooks[0].values if hooks else None


class _NormalizeInput:
    """The hook, which copies of the network share, also on other devices."""

    def __init__(self, normalize: Normalize) -> None:
        self._by_device = {normalize.mean.device: normalize}

    @property
    def values(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation, in units of the full range."""
        first = next(iter(self._by_device.values()))
        return tuple(first.mean.flatten().tolist()), tuple(first.std.flatten().tolist())

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images = inputs[0]
        if images.device not in self._by_device:
            first = next(iter(self._by_device.values()))
            self._by_device[images.device] = copy.deepcopy(first).to(images.device)
        return (self._by_device[images.device](images), *inputs[1:])
