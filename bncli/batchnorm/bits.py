"""Tensors as bit patterns: the only comparison that neither hides a NaN nor trips over one."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per number


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory in row-major order, as uint8 of shape (num_bytes,), on its device."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def bitwise_equal(first: Tensor, second: Tensor) -> bool:
    """Whether dtype, shape and every bit agree: equal NaNs are equal, 0.0 and -0.0 are not."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(as_bytes(first), as_bytes(second))


def differing_rows(first: Tensor, second: Tensor) -> Tensor:
    """Which rows (N,) of two tensors (N, ...) of one dtype and shape differ in any bit, as bool."""
    size = first.element_size() * first[:1].numel()
    pairs = (as_bytes(first).view(len(first), size), as_bytes(second).view(len(second), size))
    return (pairs[0] != pairs[1]).any(1)


def max_ulp_diff(first: Tensor, second: Tensor) -> int | None:
    """The largest distance between two numbers at one place, in units in the last place.

    That is how many steps to the next floating-point number lead from one to the other. 0.0 and -0.0 are
    one number, infinity follows the largest finite one, and two NaNs are equal. None where one value is
    a NaN and the other is not. For tensors of one shape and dtype: float64, float32, float16, bfloat16.
    """
    nans = first.isnan()
    if not torch.equal(nans, second.isnan()):
        return None
    # as unsigned numbers, since two float64 of opposite sign are up to 2**64 - 2**53 steps apart
    one, one_negative = _steps_from_zero(first.masked_fill(nans, 0.0))
    two, two_negative = _steps_from_zero(second.masked_fill(nans, 0.0))
    across_zero = one_negative != two_negative
    steps = np.where(across_zero, one + two, np.maximum(one, two) - np.minimum(one, two))
    return int(steps.max(initial=0))


def _steps_from_zero(tensor: Tensor) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """How far each number is from zero in the order of its magnitudes, and whether it is negative."""
    # IEEE 754 orders the bits below the sign like the magnitudes that they stand for
    bits = tensor.detach().cpu().contiguous().view(_INTEGERS[tensor.element_size()])
    magnitude = bits.long() & torch.iinfo(bits.dtype).max
    return magnitude.numpy().astype(np.uint64), (bits < 0).numpy()
