"""How far the mean and variance of one layer's channels are from others: the one place that computes it.

One of the two pairs is the reference. What eval mode does with the reference is (x - mean) / sqrt(var + eps);
an input with the other mean and variance comes out of that with

    mean shift      z = (mean - reference mean) / sqrt(reference var + eps)     0 is a perfect match
    variance ratio  r = (var + eps) / (reference var + eps)                     1 is a perfect match

so the shift is in deviations of the reference. Which one that is differs by question, and the names of
results say it: `in_first_deviations` where two files are compared, `in_batch_deviations` while training,
`in_input_deviations` against what really enters a layer, `in_new_deviations` for what replaced them.

The Kullback-Leibler divergence of the two normals is a function of just these, in nats:

    KL(other || reference) = (r - 1 - ln r + z^2) / 2

It is what the input costs beyond N(0, 1), which the layers behind were trained on. eps belongs to the
variance because BatchNorm divides by their sum: without it a channel that eps decides would look far moved
when its output did not move at all. Other direction: exchange the two.
"""

from dataclasses import dataclass
from math import isnan

import torch
from torch import Tensor

from bncli.batchnorm.layers import LayerStats
from bncli.wording import plural

MeanAndVar = tuple[Tensor, Tensor]  # (C,) each, of any floating-point type


@dataclass(frozen=True, eq=False)
class Distance:
    """A mean and variance against a reference, channel by channel: float64 of shape (C,), on the CPU."""

    mean_difference: Tensor  # mean - reference mean, in the unit of the layer's input
    spread: Tensor  # var + eps
    reference_spread: Tensor  # reference var + eps

    @property
    def mean_shift(self) -> Tensor:
        """(C,) in deviations of the reference; NaN where its var + eps is negative."""
        return self.mean_difference / self.reference_spread.sqrt()

    @property
    def squared_mean_shift(self) -> Tensor:
        """(C,) without the rounding of a square root."""
        return self.mean_difference.square() / self.reference_spread

    @property
    def var_ratio(self) -> Tensor:
        """(C,) eps added to both."""
        return self.spread / self.reference_spread

    @property
    def rms_mean_shift(self) -> float:
        """Root mean square over channels, in deviations of the reference."""
        return rms(self.mean_shift)

    @property
    def mean_var_ratio(self) -> float:
        """Geometric mean over channels; NaN if one is negative."""
        return _geometric_mean(self.var_ratio)


def measure_distance(
    found: MeanAndVar, reference: MeanAndVar, *, eps: float, reference_eps: float | None = None
) -> Distance:
    """How far (mean, variance) is from the reference; `reference_eps` is `eps` unless it is given."""
    (mean, var), (reference_mean, reference_var) = (map(_wide, pair) for pair in (found, reference))
    return Distance(
        mean - reference_mean,
        var + eps,
        reference_var + (eps if reference_eps is None else reference_eps),
    )


@dataclass(frozen=True, eq=False)
class Divergence:
    """Of one layer in two files; per channel, float64 of shape (C,).

    NaN where the numbers are none that eval mode can use: a mean or variance that is not finite, or a
    var + eps that is not positive, in either.
    """

    mean_shift_in_first_deviations: Tensor  # second minus first
    var_ratio: Tensor  # second over first
    kl: Tensor  # nats, of the second from the first

    def __str__(self) -> str:
        """One line."""
        return f"{plural(len(self.kl), 'channel')}: {summarize_divergence(self)}"


@dataclass(frozen=True)
class DivergenceSummary:
    """One layer's divergence in a few numbers, over those channels that can be compared.

    None where there is no such channel. Channels count from 0; the first of several equal ones is named.
    """

    num_incomparable: int  # channels left out
    mean_shift_in_first_deviations: float | None = None  # root mean square
    max_mean_shift_in_first_deviations: float | None = None  # the largest distance, without its sign
    max_mean_shift_channel: int | None = None
    var_ratio: float | None = None  # geometric mean
    var_ratio_min: float | None = None
    var_ratio_max: float | None = None
    kl: float | None = None  # mean, so that a wide layer is not further moved than a narrow one
    kl_sum: float | None = None  # of the layer's channels taken as independent
    max_kl: float | None = None
    max_kl_channel: int | None = None

    def __str__(self) -> str:
        """One line."""
        if self.kl is None:
            return "no channel can be compared"
        left_out = f"; channels left out: {self.num_incomparable}" if self.num_incomparable else ""
        return (
            f"mean shift {self.mean_shift_in_first_deviations:.2g} of the first's deviations (at most"
            f" {self.max_mean_shift_in_first_deviations:.2g}, in channel {self.max_mean_shift_channel}),"
            f" variance ratio {self.var_ratio:.2g} ({self.var_ratio_min:.2g} to {self.var_ratio_max:.2g}),"
            f" KL divergence {self.kl:.2g} (at most {self.max_kl:.2g}, in channel {self.max_kl_channel})"
            f"{left_out}"
        )


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
    first_eps, second_eps = _eps(first, second)
    found = measure_distance(
        (second.running_mean, second.running_var),
        (first.running_mean, first.running_var),
        eps=second_eps,
        reference_eps=first_eps,
    )
    usable = found.mean_difference.isfinite()
    for spread in (found.spread, found.reference_spread):
        usable &= spread.isfinite() & (spread > 0)
    z, r = found.mean_shift, found.var_ratio
    kl = (_excess(found.reference_spread, found.spread) + z.square()) / 2
    return Divergence(*(values.masked_fill(~usable, torch.nan) for values in (z, r, kl)))


def summarize_divergence(found: Divergence) -> DivergenceSummary:
    """Root mean square, geometric mean, mean, and the extremes with their channels."""
    usable = ~found.kl.isnan()
    num_incomparable = int((~usable).sum())
    if not bool(usable.any()):
        return DivergenceSummary(num_incomparable)
    shift = found.mean_shift_in_first_deviations
    z, r, kl = shift[usable], found.var_ratio[usable], found.kl[usable]
    return DivergenceSummary(
        num_incomparable=num_incomparable,
        mean_shift_in_first_deviations=rms(z),
        max_mean_shift_in_first_deviations=float(z.abs().max()),
        max_mean_shift_channel=int(shift.abs().masked_fill(~usable, -1).argmax()),
        var_ratio=_geometric_mean(r),
        var_ratio_min=float(r.min()),
        var_ratio_max=float(r.max()),
        kl=float(kl.mean()),
        kl_sum=float(kl.sum()),
        max_kl=float(kl.max()),
        max_kl_channel=int(found.kl.masked_fill(~usable, -1).argmax()),
    )


def nan_as_farthest(distance: float) -> float:
    """The distance, with infinity for what is no number: so that a broken layer ranks as the worst."""
    return float("inf") if isnan(distance) else distance


def rms(values: Tensor) -> float:
    """Root mean square over channels."""
    return float(values.double().square().mean().sqrt())


def _geometric_mean(values: Tensor) -> float:
    return float(values.log().mean().exp())


def _wide(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)


def _excess(one: Tensor, two: Tensor) -> Tensor:
    """r - 1 - ln r for r = two / one, which is never negative."""
    above = (two - one) / one  # r - 1 without the rounding of r: near 1 that would be all there is
    logarithm = torch.where(above.abs() < 0.5, above.log1p(), (two / one).log())  # near 0, r itself is exact
    return (above - logarithm).clamp(min=0)


def _eps(first: LayerStats, second: LayerStats) -> tuple[float, float]:
    one, two = first.eps_or_default, second.eps_or_default
    if first.convention == second.convention:  # then what one file tells holds for the other
        known = next((eps for eps in (first.eps, second.eps) if eps is not None), one)
        one, two = (known if layer.eps is None else layer.eps for layer in (first, second))
    return one, two
