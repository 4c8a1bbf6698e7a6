"""How far two sets of running statistics of one layer are apart, channel by channel.

The first is the reference. What eval mode does with it is (x - mean) / sqrt(var + eps); an input with the
second's mean and variance comes out of that with

    mean_shift z = (mean_2 - mean_1) / sqrt(var_1 + eps)      in standard deviations; 0 is a perfect match
    var_ratio  r = (var_2 + eps) / (var_1 + eps)              of what is divided by; 1 is a perfect match

and the Kullback-Leibler divergence of the two normals is a function of just these, in nats:

    KL(second || first) = (r - 1 - ln r + z^2) / 2

It is what the input costs beyond N(0, 1), which the layers behind were trained on. eps belongs to the
variance because BatchNorm divides by their sum: without it a channel that eps decides would look far moved
when its output did not move at all. Other direction: exchange the two.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bncli.batchnorm.audit.audit import DEFAULT_EPS
from bncli.batchnorm.layers import LayerStats


@dataclass(frozen=True, eq=False)
class Divergence:
    """Per channel, float64 of shape (C,); NaN where the numbers are none that eval mode can use.

    That is a mean or variance that is not finite, or a var + eps that is not positive, in either.
    """

    mean_shift: Tensor
    var_ratio: Tensor
    kl: Tensor  # nats, of the second from the first


@dataclass(frozen=True)
class DivergenceSummary:
    """One layer's divergence in a few numbers, over those channels that can be compared.

    None where there is no such channel. Channels count from 0; the first of several equal ones is named.
    """

    num_incomparable: int  # channels left out
    mean_shift: float | None = None  # root mean square
    max_mean_shift: float | None = None  # the largest distance, without its sign
    max_mean_shift_channel: int | None = None
    var_ratio: float | None = None  # geometric mean
    var_ratio_min: float | None = None
    var_ratio_max: float | None = None
    kl: float | None = None  # mean, so that a wide layer is not further moved than a narrow one
    kl_sum: float | None = None  # of the layer's channels taken as independent
    max_kl: float | None = None
    max_kl_channel: int | None = None


def diverge(first: LayerStats, second: LayerStats) -> Divergence | None:
    """The second's distance from the first; None where either has no running statistics.

    An unknown eps is taken from the other layer, or to be PyTorch's default.

    Raises ValueError when their numbers of channels differ.
    """
    if first.num_features != second.num_features:
        raise ValueError(f"{first.num_features} and {second.num_features} channels cannot be compared")
    if first.running_mean is None or first.running_var is None:
        return None
    if second.running_mean is None or second.running_var is None:
        return None
    one, two = (
        layer.running_var.double() + eps
        for layer, eps in zip((first, second), _eps(first, second), strict=True)
        if layer.running_var is not None
    )
    distance = second.running_mean.double() - first.running_mean.double()
    usable = distance.isfinite() & one.isfinite() & two.isfinite() & (one > 0) & (two > 0)
    z, r = distance / one.sqrt(), two / one
    kl = (_excess(one, two) + z.square()) / 2
    return Divergence(*(values.masked_fill(~usable, torch.nan) for values in (z, r, kl)))


def summarize_divergence(found: Divergence) -> DivergenceSummary:
    """Root mean square, geometric mean, mean, and the extremes with their channels."""
    usable = ~found.kl.isnan()
    num_incomparable = int((~usable).sum())
    if not bool(usable.any()):
        return DivergenceSummary(num_incomparable)
    z, r, kl = found.mean_shift[usable], found.var_ratio[usable], found.kl[usable]
    farthest = int(found.mean_shift.abs().masked_fill(~usable, -1).argmax())
    worst = int(found.kl.masked_fill(~usable, -1).argmax())
    return DivergenceSummary(
        num_incomparable=num_incomparable,
        mean_shift=float(z.square().mean().sqrt()),
        max_mean_shift=float(z.abs().max()),
        max_mean_shift_channel=farthest,
        var_ratio=float(r.log().mean().exp()),
        var_ratio_min=float(r.min()),
        var_ratio_max=float(r.max()),
        kl=float(kl.mean()),
        kl_sum=float(kl.sum()),
        max_kl=float(kl.max()),
        max_kl_channel=worst,
    )


def _excess(one: Tensor, two: Tensor) -> Tensor:
    """r - 1 - ln r for r = two / one, which is never negative."""
    above = (two - one) / one  # r - 1 without the rounding of r: near 1 that would be all there is
    logarithm = torch.where(above.abs() < 0.5, above.log1p(), (two / one).log())  # near 0, r itself is exact
    return (above - logarithm).clamp(min=0)


def _eps(first: LayerStats, second: LayerStats) -> tuple[float, float]:
    one, two = first.eps, second.eps
    known = next((eps for eps in (one, two) if eps is not None), DEFAULT_EPS)
    return (known if one is None else one, known if two is None else two)
