"""Three numbers that stand for a tensor in a table or in JSON."""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """Smallest, middle and largest value, in the tensor's unit. One NaN makes all three NaN."""

    min: float
    median: float
    max: float


def summarize(tensor: Tensor | None) -> Summary | None:
    """Summarise every value of a tensor of any shape, in float64; None for no tensor or no values.

    Nothing is left out: infinities count as the values they are, and a NaN, which has no place in an
    order, turns the whole summary into NaN. The median of an even number of values is the mean of the
    two in the middle.
    """
    if tensor is None or tensor.numel() == 0:
        return None
    # tens of thousands of small tensors: NumPy sorts them several times faster than PyTorch, NaN last as well
    values = np.sort(tensor.detach().cpu().double().flatten().numpy())
    if math.isnan(values[-1]):
        return Summary(math.nan, math.nan, math.nan)
    low, high = float(values[(len(values) - 1) // 2]), float(values[len(values) // 2])
    median = low / 2 + high / 2  # low + high might overflow
    return Summary(float(values[0]), median, float(values[-1]))
