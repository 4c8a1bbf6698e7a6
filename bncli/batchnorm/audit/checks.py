"""The tests behind the rules: which layers and channels each of them finds, and the numbers that show it.

A check of single layers gets all their channels at once. It yields a `Hit` per layer, in order.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bncli.batchnorm.audit.channels import Channels, active_share, dead, gain, mean_in_deviations
from bncli.batchnorm.audit.rules import PYTORCH_MOMENTUM
from bncli.batchnorm.layers import LayerStats

MAX_MULTIPLE = 8  # updates per step that BN011 knows; beyond, two counters are a multiple by chance

Values = dict[str, float | int | str]
Limits = Mapping[str, float]


@dataclass(frozen=True)
class Hit:
    """A layer in which a rule found something."""

    index: int  # of the layer
    channels: tuple[int, ...]  # empty: the layer as a whole
    values: Values
    text: str  # the numbers in words


def _by_layer(
    channels: Channels, found: Tensor, describe: Callable[[Tensor], tuple[Values, str]]
) -> Iterator[Hit]:
    """A hit for every layer with found channels; `describe` gets their positions among all."""
    where = found.nonzero().flatten()
    owners, counts = channels.layer[where].unique_consecutive(return_counts=True)
    for index, positions in zip(owners.tolist(), where.split(counts.tolist()), strict=True):
        values, text = describe(positions)
        numbers = tuple((positions - channels.first[index]).tolist())
        yield Hit(index, numbers, values, text)


def _untouched(layers: Sequence[LayerStats], channels: Channels) -> list[bool]:
    """Per layer, whether its statistics are exactly the initial ones."""
    moved = ~((channels.running_mean == 0) & (channels.running_var == 1))
    touched = torch.zeros(len(layers), dtype=torch.int64).index_add_(0, channels.layer, moved.long())
    return [
        layer.num_features > 0 and number == 0 for layer, number in zip(layers, touched.tolist(), strict=True)
    ]


def never_updated(layers: Sequence[LayerStats], channels: Channels, _: Limits) -> Iterator[Hit]:
    """Whether mean and variance are exactly 0 and 1 in every channel."""
    for index, untouched in enumerate(_untouched(layers, channels)):
        if untouched:
            count = layers[index].num_batches_tracked
            known = {} if count is None else {"num_batches_tracked": count}
            text = "running_mean is 0 and running_var is 1 in every channel"
            yield Hit(index, (), {**known}, text)


def initial_residue(layers: Sequence[LayerStats], channels: Channels, limits: Limits) -> Iterator[Hit]:
    """Whether (1 - momentum) ^ num_batches_tracked is too large."""
    untouched = _untouched(layers, channels)
    for index, layer in enumerate(layers):
        momentum = layer.momentum if layer.hyperparameters_known else PYTORCH_MOMENTUM
        count = layer.num_batches_tracked
        if momentum is None or not 0 < momentum < 1 or not count or count < 0:
            continue
        if untouched[index] or layer.was_measured or layer.running_var is None:
            continue
        residue = (1 - momentum) ** count
        # float32 averages may round a variance of 0 to slightly below the residue
        if residue <= limits["residue"] or bool((layer.running_var.double() < 0.999 * residue).any()):
            continue
        assumed = "" if layer.hyperparameters_known else " (assumed)"
        text = f"{residue:.2g} of (0, 1) is left after {count} updates with momentum {momentum:g}{assumed}"
        yield Hit(index, (), {"residue": residue, "num_batches_tracked": count, "momentum": momentum}, text)


def non_finite(layers: Sequence[LayerStats], channels: Channels, _: Limits) -> Iterator[Hit]:
    """Which channels have a NaN or an infinity, and in which tensor."""
    known = torch.tensor([layer.running_var is not None for layer in layers], dtype=torch.bool)[
        channels.layer
    ]
    has_mean = torch.tensor([layer.running_mean is not None for layer in layers], dtype=torch.bool)[
        channels.layer
    ]
    broken = {
        "running_mean": ~channels.running_mean.isfinite() & has_mean,
        "running_var": ~channels.running_var.isfinite() & known,
        "weight": ~channels.weight.isfinite(),
        "bias": ~channels.bias.isfinite(),
    }

    def describe(where: Tensor) -> tuple[Values, str]:
        counts: Values = {name: int(mask[where].sum()) for name, mask in broken.items() if mask[where].any()}
        return counts, ", ".join(f"{count} in {name}" for name, count in counts.items())

    yield from _by_layer(channels, torch.stack(list(broken.values())).any(0), describe)


def negative_variance(_: Sequence[LayerStats], channels: Channels, __: Limits) -> Iterator[Hit]:
    """Which variances are below 0."""

    def describe(where: Tensor) -> tuple[Values, str]:
        low = float(channels.running_var[where].min())
        return {"running_var": low}, f"running_var down to {low:.3g}"

    yield from _by_layer(channels, channels.running_var < 0, describe)


def eps_decides(_: Sequence[LayerStats], channels: Channels, limits: Limits) -> Iterator[Hit]:
    """Which channels divide by more eps than variance, without being dead."""
    share = channels.eps / (channels.running_var + channels.eps)
    found = (
        (share > limits["eps_share"]) & (channels.running_var > 0) & ~dead(channels, limits["dead_variance"])
    )

    def describe(where: Tensor) -> tuple[Values, str]:
        low, eps = float(channels.running_var[where].min()), float(channels.eps[where[0]])
        return {"running_var": low, "eps": eps}, f"running_var down to {low:.3g} with eps {eps:g}"

    yield from _by_layer(channels, found, describe)


def dead_channel(_: Sequence[LayerStats], channels: Channels, limits: Limits) -> Iterator[Hit]:
    """Which channels give nearly the same output for every image."""

    def describe(where: Tensor) -> tuple[Values, str]:
        zero = int((channels.weight[where] == 0).sum())
        low = float(channels.running_var[where].nan_to_num(torch.inf).min())
        values: Values = {"num_zero_weights": zero, "running_var": low}
        return values, f"weight 0 in {zero}, running_var down to {low:.3g}"

    yield from _by_layer(channels, dead(channels, limits["dead_variance"]), describe)


def exploding_gain(_: Sequence[LayerStats], channels: Channels, limits: Limits) -> Iterator[Hit]:
    """Which channels are far steeper than their layer, or too steep for float16."""
    gains = gain(channels)
    judged = (channels.running_var > 0) & ~dead(channels, limits["dead_variance"])  # below 0 is BN004's
    found = judged & (gains > limits["gain"]) & gains.isfinite()
    if not bool(found.any()):
        return
    medians = torch.full_like(gains, torch.inf)
    for index in channels.layer[found].unique().tolist():  # few layers get here
        inside = channels.layer == index
        medians[inside] = gains[inside & gains.isfinite()].median()
    found &= (gains > limits["gain_per_median"] * medians) | (gains > limits["gain_limit"])

    def describe(where: Tensor) -> tuple[Values, str]:
        high, median = float(gains[where].max()), float(medians[where[0]])
        return {"gain": high, "median": median}, f"gain up to {high:.3g}, median of the layer {median:.3g}"

    yield from _by_layer(channels, found, describe)


def switched_off(_: Sequence[LayerStats], channels: Channels, limits: Limits) -> Iterator[Hit]:
    """Which channels are hardly ever above 0, under a normal model."""
    share = active_share(channels)
    alive = channels.bias.isfinite() & ~dead(channels, limits["dead_variance"])
    found = (share < limits["active_share"]) & (channels.bias <= -limits["off_bias"]) & alive

    def describe(where: Tensor) -> tuple[Values, str]:
        low = float(share[where].min())
        return {"active_share": low}, f"the share of outputs above 0 is down to {low:.2g}"

    yield from _by_layer(channels, found, describe)


def counter_type(layers: Sequence[LayerStats], _: Channels, __: Limits) -> Iterator[Hit]:
    """Whether the counter is of another type than PyTorch's."""
    for index, layer in enumerate(layers):
        if layer.counter_dtype not in (None, torch.int64):
            name = str(layer.counter_dtype).removeprefix("torch.")
            yield Hit(index, (), {"dtype": name}, f"num_batches_tracked is {name}")


def _deviating_counts(
    layers: Sequence[LayerStats], channels: Channels
) -> Iterator[tuple[int, int, int, int]]:
    """Layers that count otherwise than most: index, count, the usual count, and the multiple (0: none)."""
    untouched = _untouched(layers, channels)
    counts = {
        index: layer.num_batches_tracked
        for index, layer in enumerate(layers)
        if layer.num_batches_tracked is not None and not untouched[index]
    }
    frequency = Counter(counts.values())
    if len(frequency) < 2:
        return
    usual = min(frequency, key=lambda count: (-frequency[count], count))
    for index, count in counts.items():
        if count == usual:
            continue
        small, large = sorted((count, usual))
        exact = small > 0 and large % small == 0 and large // small <= MAX_MULTIPLE
        yield index, count, usual, large // small if exact else 0


def counter_unequal(layers: Sequence[LayerStats], channels: Channels, _: Limits) -> Iterator[Hit]:
    """Whether a counter differs from that of most layers."""
    for index, count, usual, multiple in _deviating_counts(layers, channels):
        if not multiple:
            text = f"num_batches_tracked {count}, {usual} in most layers"
            yield Hit(index, (), {"num_batches_tracked": count, "usual": usual}, text)


def counter_multiple(layers: Sequence[LayerStats], channels: Channels, _: Limits) -> Iterator[Hit]:
    """Whether a counter is a small multiple of that of most layers, or the other way round."""
    for index, count, usual, multiple in _deviating_counts(layers, channels):
        if multiple:
            times = f"{multiple} times" if count > usual else f"1/{multiple} of"
            text = f"num_batches_tracked {count}, {times} the {usual} of most layers"
            yield Hit(index, (), {"num_batches_tracked": count, "usual": usual, "multiple": multiple}, text)


def far_mean(_: Sequence[LayerStats], channels: Channels, limits: Limits) -> Iterator[Hit]:
    """Which means are too many deviations away from 0."""
    distance = mean_in_deviations(channels)
    alive = ~dead(channels, limits["dead_variance"])

    def describe(where: Tensor) -> tuple[Values, str]:
        high = float(distance[where].max())
        return {"mean_in_deviations": high}, f"mean up to {high:.3g} deviations from 0"

    yield from _by_layer(
        channels, (distance > limits["mean_in_deviations"]) & distance.isfinite() & alive, describe
    )


def no_running_stats(layers: Sequence[LayerStats], _: Channels, __: Limits) -> Iterator[Hit]:
    """Whether there is no running mean or no running variance."""
    for index, layer in enumerate(layers):
        if layer.running_mean is None or layer.running_var is None:
            yield Hit(index, (), {}, "no running_mean and running_var")


CHECKS: dict[str, Callable[[Sequence[LayerStats], Channels, Limits], Iterator[Hit]]] = {
    check.__name__: check
    for check in (
        never_updated,
        initial_residue,
        non_finite,
        negative_variance,
        eps_decides,
        dead_channel,
        exploding_gain,
        switched_off,
        counter_type,
        counter_unequal,
        counter_multiple,
        far_mean,
        no_running_stats,
    )
}
