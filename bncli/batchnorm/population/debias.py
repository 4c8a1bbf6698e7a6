"""The start (0, 1) of an exponential average, removed without any data.

After t batches an average with momentum m holds the fraction r = (1 - m)**t of what it started with, and
1 - r of the batches: running = r * start + (1 - r) * batches. So batches = (running - r * start) / (1 - r),
the bias correction of Adam (Kingma & Ba 2015). It holds if momentum was the same for all batches and the
start was PyTorch's; neither can be seen in a checkpoint, except where a variance turns out negative.
"""

from math import isfinite

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batchnorm.layers import float64_statistics


def without_start(layer: _BatchNorm) -> tuple[Tensor, Tensor] | str:
    """What running_mean and running_var (C,) would hold without their start, float64; or why not."""
    if layer.momentum is None:
        return "has momentum None: a cumulative average holds nothing of its start"
    if layer.num_batches_tracked is None:
        return "does not know how many batches it tracked"
    num_batches = float(layer.num_batches_tracked)
    if not isfinite(num_batches) or num_batches < 0 or not 0 <= layer.momentum <= 1:
        return f"has momentum {layer.momentum:g} and tracked {num_batches:g} batches, which cannot be"
    rest = (1 - layer.momentum) ** num_batches
    if rest == 1:
        return f"holds nothing but its start: {num_batches:g} batches with momentum {layer.momentum:g}"
    mean, var = float64_statistics(layer)
    mean, var = mean / (1 - rest), (var - rest) / (1 - rest)
    if not bool((var >= 0).all()):
        return "did not start at variance 1, or momentum was not constant: a variance would be negative"
    return mean, var
