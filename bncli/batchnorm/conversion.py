"""Whether one BatchNorm layer is a converted copy of another, and which mistake was made on the way.

Conversion between frameworks goes wrong in few ways, and each leaves a mark in the numbers: variances that
differ by one factor n / (n - 1) in every channel (Bessel's correction, n values per channel), mean and
variance in each other's place, channels in another order (an axis that was forgotten), a momentum taken over
where its complement was meant, an eps that stayed the target's default. What bears no such mark is another
layer, or the same one later in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bncli.batchnorm.layers import LayerStats

Kind = Literal["equal", "rounded", "bessel", "swapped", "permuted", "different", "unknown"]
QUANTITIES = ("running_mean", "running_var", "weight", "bias")
ROUNDINGS = 4  # of the coarser type, in units of its last place: what conversions and back leave
MIN_PROOF = 20.0  # times the rounding: as far from 1 must the factor of the variances be
MIN_CHANNELS = 2  # of a constant factor; one channel has always one
MAX_VALUES = 1e9  # per channel, of Bessel's correction: beyond, float32 does not show it
MAX_PAIRS = 4_000_000  # of layers that are held against each other


@dataclass(frozen=True, eq=False)
class Relation:
    """How the second layer's numbers follow from the first's."""

    kind: Kind
    largest: float  # relative difference that is left: of means in deviations, of all else to the largest
    values: float | None = None  # per channel, of Bessel's correction; None for other kinds
    second_is_unbiased: bool = False
    order: Tensor | None = None  # (C,) int64: channel c of the second is channel order[c] of the first
    axes: tuple[int, int] | None = None  # (a, b) where the order is that of a matrix (a, b) transposed

    @property
    def is_copy(self) -> bool:
        """Whether the second was made from the first, rightly or not."""
        return self.kind not in ("different", "unknown")


def relate(first: LayerStats, second: LayerStats) -> Relation:
    """How the second layer follows from the first; both have running statistics of the same length."""
    one, two = _numbers(first), _numbers(second)
    if one is None or two is None:
        return Relation("unknown", torch.nan)
    allowed = ROUNDINGS * max(_rounding(first), _rounding(second))
    if _are_equal(first, second):
        return Relation("equal", 0.0)
    if (left := _difference(one, two)) <= allowed:
        return Relation("rounded", left)
    found = _bessel(one, two, allowed) or _swapped(one, two, allowed) or _permuted(one, two, allowed)
    return found or Relation("different", left)


def pair_by_values(
    first: Sequence[LayerStats], second: Sequence[LayerStats]
) -> list[tuple[LayerStats, LayerStats]]:
    """Copies of layers, in the order of both: the longest such series, whatever the layers are called."""
    rows, columns = len(first), len(second)
    if rows * columns > MAX_PAIRS:
        return []
    copies = {
        (row, column)
        for row in range(rows)
        for column in range(columns)
        if first[row].num_features == second[column].num_features
        and relate(first[row], second[column]).is_copy
    }
    best = [[0] * (columns + 1) for _ in range(rows + 1)]  # of the layers from here on
    for row in reversed(range(rows)):
        for column in reversed(range(columns)):
            skip = max(best[row + 1][column], best[row][column + 1])
            best[row][column] = max(skip, 1 + best[row + 1][column + 1]) if (row, column) in copies else skip
    pairs, row, column = [], 0, 0
    while row < rows and column < columns:
        if (row, column) in copies and best[row][column] == 1 + best[row + 1][column + 1]:
            pairs.append((first[row], second[column]))
            row, column = row + 1, column + 1
        elif best[row + 1][column] >= best[row][column + 1]:
            row += 1
        else:
            column += 1
    return pairs


def eps_matters(first: LayerStats, second: LayerStats) -> float | None:
    """By how much outputs differ at most because of another eps alone, relative; None where it is equal.

    An unknown eps is the default of the framework.
    """
    one, two = first.eps_or_default, second.eps_or_default
    if one == two or first.running_var is None:
        return None
    variance = first.running_var.double()
    ratio = ((variance + one) / (variance + two)).sqrt()
    off = (ratio - 1).abs()
    return float(off[off.isfinite()].max()) if bool(off.isfinite().any()) else None


def momentum_is_inverted(first: LayerStats, second: LayerStats) -> bool:
    """Whether one momentum is 1 minus the other, and not the same."""
    one, two = first.momentum, second.momentum
    if one is None or two is None or not (first.hyperparameters_known and second.hyperparameters_known):
        return False
    return abs(one + two - 1) < 1e-6 and abs(one - two) > 1e-6


def _numbers(layer: LayerStats) -> dict[str, Tensor] | None:
    """The four as float64 (C,); a layer without weight or bias has 1 and 0."""
    if layer.running_mean is None or layer.running_var is None:
        return None
    size = (layer.num_features,)
    return {
        "running_mean": layer.running_mean.double(),
        "running_var": layer.running_var.double(),
        "weight": torch.ones(size, dtype=torch.float64) if layer.weight is None else layer.weight.double(),
        "bias": torch.zeros(size, dtype=torch.float64) if layer.bias is None else layer.bias.double(),
    }


def _rounding(layer: LayerStats) -> float:
    """Of the coarsest type that the layer's numbers are stored in."""
    tensors = [getattr(layer, name) for name in QUANTITIES]
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors if tensor is not None)


def _are_equal(first: LayerStats, second: LayerStats) -> bool:
    one, two = _numbers(first), _numbers(second)
    assert one is not None
    assert two is not None
    return all(torch.equal(one[name], two[name]) for name in QUANTITIES)


def _difference(one: dict[str, Tensor], two: dict[str, Tensor], without: str | None = None) -> float:
    """The largest over the four; infinite where a number is none.

    Means are compared in deviations of the first, variances relative, the rest relative to the largest.
    """
    deviation = one["running_var"].clamp(min=0).sqrt()
    floor = float(torch.finfo(torch.float32).tiny)
    scales = {
        "running_mean": torch.maximum(deviation, one["running_mean"].abs()),
        "running_var": one["running_var"].abs(),
        "weight": one["weight"].abs().max(),
        "bias": torch.maximum(one["bias"].abs().max(), one["weight"].abs().max()),
    }
    worst = 0.0
    for name, scale in scales.items():
        if name != without:
            off = (two[name] - one[name]).abs()
            relative = torch.where(off == 0, 0.0, off / scale.clamp(min=floor))
            if not bool(relative.isfinite().all()):
                return torch.inf
            worst = max(worst, float(relative.max()))
    return worst


def _bessel(one: dict[str, Tensor], two: dict[str, Tensor], allowed: float) -> Relation | None:
    if len(one["running_var"]) < MIN_CHANNELS or _difference(one, two, "running_var") > allowed:
        return None
    varies = one["running_var"] > 0
    if not bool(varies.any()) or not torch.equal(varies, two["running_var"] > 0):
        return None
    ratio = two["running_var"][varies] / one["running_var"][varies]
    factor = float(ratio.median())
    if abs(factor - 1) <= MIN_PROOF * allowed or float((ratio / factor - 1).abs().max()) > 2 * allowed:
        return None
    larger = max(factor, 1 / factor)
    values = larger / (larger - 1)
    if not MIN_CHANNELS - 1e-3 <= values <= MAX_VALUES:
        return None
    return Relation("bessel", abs(factor - 1), values, second_is_unbiased=factor > 1)


def _swapped(one: dict[str, Tensor], two: dict[str, Tensor], allowed: float) -> Relation | None:
    back = {**two, "running_mean": two["running_var"], "running_var": two["running_mean"]}
    left = _difference(one, back)
    return Relation("swapped", left) if left <= allowed else None


def _permuted(one: dict[str, Tensor], two: dict[str, Tensor], allowed: float) -> Relation | None:
    """The same channels in another order: found by their means and variances, proved by all four."""
    orders = [_sorting(each) for each in (one, two)]
    order = torch.empty_like(orders[0])
    order[orders[1]] = orders[0]
    left = _difference({name: values[order] for name, values in one.items()}, two)
    if left > allowed:
        return None
    return Relation("permuted", left, order=order, axes=_transposed(order))


def _sorting(numbers: dict[str, Tensor]) -> Tensor:
    """The order of channels by mean, and by variance where means are equal: (C,)."""
    by_variance = numbers["running_var"].argsort(stable=True)
    return by_variance[numbers["running_mean"][by_variance].argsort(stable=True)]


def _transposed(order: Tensor) -> tuple[int, int] | None:
    """(a, b) where the order is that of a matrix (a, b) read by columns."""
    size, second = len(order), int(order[1]) if len(order) > 1 else 0
    if second < 2 or size % second:
        return None
    matrix = torch.arange(size).reshape(size // second, second)
    return (size // second, second) if torch.equal(matrix.T.flatten(), order) else None
