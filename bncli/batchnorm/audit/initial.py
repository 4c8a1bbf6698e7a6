"""How much of the initial statistics, mean 0 and variance 1, a layer still holds: what its numbers prove.

An exponential average that began at (0, 1) and still holds the share s of its start is

    running_var_c  = s + (1 - s) b_c        b_c >= 0 what the batches alone would have left in channel c
    running_mean_c = (1 - s) m_c

so s is at most the smallest running_var. The channels of a real layer differ: the 10 % quantile of b lies
well below its median, in nearly all networks measured at no more than `EVEN` times it in most layers. Where
that holds it bounds s from below too: (q - s) <= EVEN (m - s) for the quantile q and the median m, so

    s >= (q - EVEN m) / (1 - EVEN)

It is a measured property and no law. Wide layers of random weights on white noise are more even (0.93 in
untrained perceptrons of width 1,024), but behind a ReLU their means lie far from 0, where (1 - s) m_c is
small.
"""

import math
from dataclasses import dataclass

import torch

from bncli.batchnorm.audit.channels import Network
from bncli.batchnorm.layers import LayerStats

# Chosen on the networks of the corpus, which also judged the rules: up to 0.80 (median over the layers) in
# those of torchvision and timm after 50 steps, 0.88 in small untrained ones and in wide ones on white noise.
EVEN = 0.85
# RMS mean in deviations: up to 0.30 in layers that hold a third or more; behind a ReLU of normal inputs
# random weights give sqrt((1 / 2 pi) / (1 / 2 - 1 / 2 pi)) = 0.68
MAX_MEAN = 0.4
MIN_CHANNELS = 4  # fewer say nothing about how even they are
FROZEN_EPS = 2e-3  # detectron2's FrozenBatchNorm2d starts at 1 - eps


@dataclass(frozen=True)
class Share:
    """The share of (0, 1) that is compatible with what is seen, as bounds within [0, 1]."""

    at_least: float
    at_most: float


def count_of(layer: LayerStats) -> int | None:
    """Its `num_batches_tracked`; None where that is none, and where it is an average of counters."""
    kind = layer.counter_dtype
    return (
        None
        if kind is not None and (kind.is_floating_point or kind == torch.bool)
        else layer.num_batches_tracked
    )


def momentum_of(layer: LayerStats) -> tuple[float | None, bool]:
    """Weight of the new batch (None: cumulative), and whether that is assumed."""
    if layer.hyperparameters_known:
        return layer.momentum, False
    return layer.convention.new_batch_weight, True


def are_initial(network: Network) -> list[bool]:
    """Per layer, whether its mean is exactly 0 and its variance 1, or 1 - eps, in every channel."""
    channels = network.channels
    firsts = [
        position for position, layer in zip(channels.first, network.layers, strict=True) if layer.num_features
    ]
    variance = torch.ones(len(network.layers), dtype=torch.float64)
    owners = [index for index, layer in enumerate(network.layers) if layer.num_features]
    variance[owners] = channels.running_var[firsts]
    same = channels.running_var == variance[channels.layer]
    at_1 = (channels.running_var <= 1) & (channels.running_var > 1 - FROZEN_EPS)
    moved = network.any_in_layer(~((channels.running_mean == 0) & same & at_1))
    return [layer.num_features > 0 and not one for layer, one in zip(network.layers, moved, strict=True)]


def have_initial_affine(network: Network) -> list[bool]:
    """Per layer, whether weight is 1 everywhere, or 0 everywhere, and bias 0: as built."""
    channels = network.channels
    not_1 = network.any_in_layer((channels.weight != 1) | (channels.bias != 0))
    not_0 = network.any_in_layer((channels.weight != 0) | (channels.bias != 0))
    return [not (one and zero) for one, zero in zip(not_1, not_0, strict=True)]


def share_of_initial(layer: LayerStats) -> Share | None:
    """What its variances say; None for a layer that has too few channels to tell."""
    if layer.running_var is None or layer.num_features < MIN_CHANNELS:
        return None
    variance = layer.running_var.double()
    mean = torch.zeros_like(variance) if layer.running_mean is None else layer.running_mean.double()
    if not bool(variance.isfinite().all() & mean.isfinite().all()):
        return None
    low, median = (
        float(variance.kthvalue(1 + place).values)
        for place in ((len(variance) - 1) // 10, len(variance) // 2)
    )
    at_most = min(max(float(variance.min()), 0.0), 1.0)
    if float(mean.square().mean()) > MAX_MEAN**2 * median:
        return Share(0.0, at_most)
    # a variance above 1 cannot be all start
    return Share(min(max((low - EVEN * median) / (1 - EVEN), 0.0), 1.0), at_most)


def is_off_1(layer: LayerStats) -> bool:
    """Whether the variances have moved away from 1 together, farther than they scatter.

    An input that truly has variance 1 leaves them on both sides of it: their mean is then within a few
    standard errors, deviation / sqrt(C), of 1.
    """
    if layer.running_var is None or layer.num_features < MIN_CHANNELS:
        return False
    variance = layer.running_var.double()
    standard_error = float(variance.std()) / math.sqrt(layer.num_features)
    return abs(float(variance.mean()) - 1) > 5 * standard_error


def lies_behind(layer: LayerStats, before: LayerStats) -> bool:
    """Whether a layer normalises what the layer before it put out, with nothing in between.

    A normalised batch has exactly mean bias and variance weight ** 2, times n / (n - 1): there is no scatter
    from channel to channel, and a variance near 1 comes from a weight near 1.
    """
    if layer.running_var is None or layer.num_features < MIN_CHANNELS:
        return False
    if before.num_features != layer.num_features:
        return False
    variance = layer.running_var.double()
    expected = torch.ones_like(variance) if before.weight is None else before.weight.double().square()
    follows = float(torch.corrcoef(torch.stack([expected, variance]))[0, 1]) > 0.95
    return follows or float((variance / expected).std()) < 1e-4
