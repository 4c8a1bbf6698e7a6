"""The channels of many BatchNorm layers end to end, so that a rule looks at all of them in one step.

All numbers are float64: float16 would round the thresholds to its subnormals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bncli.batchnorm.layers import LayerStats


@dataclass(frozen=True, eq=False)
class Channels:
    """Tensors of shape (C,), C channels in all; a layer without weight or bias has 1 and 0.

    A layer without running statistics has NaN there, which no comparison finds.
    """

    layer: Tensor  # int64, the index of the layer
    first: list[int]  # per layer, where its channels begin
    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor
    eps: Tensor  # the default of its framework where unknown


@dataclass(frozen=True, eq=False)
class Network:
    """What a rule looks at: all layers of a network, and their channels end to end."""

    layers: Sequence[LayerStats]
    channels: Channels

    def any_in_layer(self, found: Tensor) -> list[bool]:
        """Per layer, whether bool (C,) holds in one of its channels."""
        counts = torch.zeros(len(self.layers), dtype=torch.int64)
        return [count > 0 for count in counts.index_add_(0, self.channels.layer, found.long()).tolist()]

    def lowest_variance(self) -> Tensor:
        """Per layer, float64; infinite where a layer has no variance."""
        lowest = torch.full((len(self.layers),), torch.inf, dtype=torch.float64)
        variance = self.channels.running_var.nan_to_num(torch.inf)
        return lowest.scatter_reduce(0, self.channels.layer, variance, "amin")


def network_of(layers: Sequence[LayerStats]) -> Network:
    """Copy the channels of all layers, in order."""
    return Network(layers, channels_of(layers))


def channels_of(layers: Sequence[LayerStats]) -> Channels:
    """Copy the channels of all layers, in order."""
    counts = torch.tensor([layer.num_features for layer in layers], dtype=torch.int64)
    first = (counts.cumsum(0) - counts).tolist()

    def join(values: list[Tensor | None], missing: float) -> Tensor:
        filled = [
            torch.full((layer.num_features,), missing, dtype=torch.float64) if value is None else value
            for layer, value in zip(layers, values, strict=True)
        ]
        # where types differ, cat takes the wider one
        return torch.cat(filled).double() if filled else torch.zeros(0, dtype=torch.float64)

    eps = torch.tensor([layer.eps_or_default for layer in layers], dtype=torch.float64)
    return Channels(
        layer=torch.arange(len(layers)).repeat_interleave(counts),
        first=first,
        running_mean=join([layer.running_mean for layer in layers], torch.nan),
        running_var=join([layer.running_var for layer in layers], torch.nan),
        weight=join([layer.weight for layer in layers], 1.0),
        bias=join([layer.bias for layer in layers], 0.0),
        eps=eps.repeat_interleave(counts),
    )


def dead(channels: Channels, dead_variance: float) -> Tensor:
    """Whose weight is exactly 0, or whose variance lies in [0, dead_variance * eps): bool (C,)."""
    variance = channels.running_var
    # variance == 0 stands apart for layers whose eps is 0
    return (
        (channels.weight == 0)
        | (variance == 0)
        | ((variance > 0) & (variance < dead_variance * channels.eps))
    )


def gain(channels: Channels) -> Tensor:
    """By how much eval mode multiplies each channel: |weight| / sqrt(running_var + eps), (C,)."""
    return channels.weight.abs() / (channels.running_var + channels.eps).sqrt()


def mean_in_deviations(channels: Channels) -> Tensor:
    """How many deviations each mean is away from 0: |running_mean| / sqrt(running_var), (C,)."""
    return channels.running_mean.abs() / channels.running_var.sqrt()


def active_share(channels: Channels) -> Tensor:
    """P(weight * z + bias > 0) where z is normal with eval mode's deviation sqrt(var / (var + eps)): (C,)."""
    deviation = (channels.running_var / (channels.running_var + channels.eps)).sqrt()
    share: Tensor = torch.special.ndtr(channels.bias / (channels.weight.abs() * deviation))
    return share
