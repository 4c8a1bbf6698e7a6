"""What is wrong with one BatchNorm layer, judged from its numbers alone.

A flag is a claim about the layer as it is; a healthy trained network has none.
"""

import torch
from torch import Tensor

from bncli.stats.layers import LayerStats

DEFAULT_EPS = 1e-5  # torch.nn.BatchNorm2d's; assumed where a state dict leaves eps unknown

# A channel's normalised input has the standard deviation s = sqrt(var / (var + eps)): 1 when var rules,
# 0 when eps does. Below var = eps / 100, s is under 0.1: BatchNorm, whose purpose is s = 1, hands on less
# than a tenth of a standard deviation, and the channel is nearly its bias whatever the image shows.
DEAD_VARIANCE_PER_EPS = 0.01


def layer_flags(layer: LayerStats) -> tuple[str, ...]:
    """The layer's flags, always in this order.

    - 'no_running_stats': no running mean or variance; eval mode then uses batch statistics.
    - 'never_updated': the buffers hold exactly their initial values, mean 0 and variance 1. The counter
      `num_batches_tracked` is not asked: it is 0 in every model that was loaded from a checkpoint
      without it (PyTorch before 0.4.1, converted weights), and it counts on when momentum is 0.
    - 'non_finite': NaN or infinity in running_mean, running_var, weight or bias.
    - 'negative_variance': a running_var below 0, which no average of variances can reach.
    - 'dead_channel': at least one of `dead_channels`.
    """
    tests = {
        "no_running_stats": layer.running_mean is None or layer.running_var is None,
        "never_updated": _holds_initial_values(layer),
        "non_finite": _has_non_finite(layer),
        "negative_variance": layer.running_var is not None and bool((layer.running_var < 0).any()),
        "dead_channel": bool(dead_channels(layer).any()),
    }
    return tuple(flag for flag, found in tests.items() if found)


def dead_channels(layer: LayerStats) -> Tensor:
    """Which channels give (nearly) the same output for every image: bool (C,).

    Dead is a channel whose weight is exactly 0, or whose running_var lies in [0, eps / 100) (see
    `DEAD_VARIANCE_PER_EPS`; eps is taken to be 1e-5 where unknown). A NaN or negative variance is another
    fault and not called dead. The last BatchNorm of a residual block may start with weight 0 on purpose.
    """
    dead = torch.zeros(layer.num_features, dtype=torch.bool)
    if layer.weight is not None:
        dead |= layer.weight == 0
    if layer.running_var is not None:
        variance = layer.running_var.double()  # float16 would round the threshold to its subnormals
        eps = DEFAULT_EPS if layer.eps is None else layer.eps
        # variance == 0 stands apart for layers whose eps is 0
        dead |= (variance == 0) | ((variance > 0) & (variance < DEAD_VARIANCE_PER_EPS * eps))
    return dead


def _holds_initial_values(layer: LayerStats) -> bool:
    if layer.running_mean is None or layer.running_var is None:
        return False
    return bool((layer.running_mean == 0).all()) and bool((layer.running_var == 1).all())


def _has_non_finite(layer: LayerStats) -> bool:
    tensors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    return any(not bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)
