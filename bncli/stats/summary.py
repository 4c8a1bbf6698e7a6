"""Three numbers that stand for a tensor in a table or in JSON."""

import math
from dataclasses import dataclass

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
    values = tensor.detach().cpu().double().flatten().sort().values
    if bool(values.isnan().any()):
        return Summary(math.nan, math.nan, math.nan)
    low = float(values[(values.numel() - 1) // 2])
    high = float(values[values.numel() // 2])
    median = low / 2 + high / 2  # low + high might overflow
    return Summary(float(values[0]), median, float(values[-1]))
