"""How far two sets of logits for the same images are apart: in bits, in numbers, in predictions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bncli.batchnorm.bits import bitwise_equal, max_ulp_diff


@dataclass(frozen=True)
class Difference:
    """Two sets of logits (R, num_classes), row by row.

    A NaN against a number is infinitely far; two NaNs, or two equal infinities, do not differ.
    """

    bitwise_equal: bool
    max_abs_diff: float
    max_rel_diff: float  # relative to the largest logit, in magnitude, of the same row
    max_ulp: int | None  # numbers between two logits, at most; None: a NaN against a number
    flips: Tensor  # (R,) bool, whether the prediction differs

    @classmethod
    def between(cls, first: Tensor, second: Tensor) -> "Difference":
        """Compare logits (R, num_classes) with others for the same images; R may be 0."""
        wide_first, wide_second = first.double(), second.double()
        same = (wide_first == wide_second) | (first.isnan() & second.isnan())
        diff = (wide_first - wide_second).abs().masked_fill(same, 0.0)
        diff = diff.nan_to_num(nan=torch.inf, posinf=torch.inf)
        scale = torch.maximum(wide_first.abs(), wide_second.abs()).nan_to_num(nan=0.0, posinf=torch.inf)
        # where a row differs, its scale is positive: a zero there would mean no difference
        relative = (diff.amax(1) / scale.amax(1)).masked_fill(diff.amax(1) == 0, 0.0)
        return cls(
            bitwise_equal=bitwise_equal(first, second),
            max_abs_diff=float(diff.max()) if len(diff) else 0.0,
            max_rel_diff=float(relative.nan_to_num(nan=torch.inf, posinf=torch.inf).max())
            if len(diff)
            else 0.0,
            max_ulp=max_ulp_diff(first, second) if first.dtype == second.dtype else None,
            flips=predictions(first) != predictions(second),
        )


def predictions(logits: Tensor) -> Tensor:
    """The predicted class (N,); -1 for a row with a NaN, which predicts nothing."""
    return logits.double().argmax(1).masked_fill(logits.isnan().any(1), -1)
