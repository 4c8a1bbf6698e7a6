"""The rules of the audit: one function each.

To add a rule, write its page in `rule_pages.py` and a function of the same name here. It gets the layers of a
network and yields a `Hit` per layer, in order. Its docstring says how it decides; the page is for users.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from math import floor

import torch
from torch import Tensor

from bncli.batchnorm.audit.channels import Network, active_share, dead, gain, mean_in_deviations
from bncli.batchnorm.audit.initial import (
    MIN_CHANNELS,
    Share,
    are_initial,
    count_of,
    have_initial_affine,
    is_off_1,
    lies_behind,
    momentum_of,
    share_of_initial,
)
from bncli.batchnorm.audit.rule_definition import Find, Hit, Limits, Rule, Severity, Values
from bncli.batchnorm.audit.rule_pages import find_page
from bncli.batchnorm.conventions import PYTORCH
from bncli.batchnorm.layers import LayerStats
from bncli.wording import plural

MAX_MULTIPLE = 8  # updates per step that BN011 knows; beyond, two counters are a multiple by chance

INITIAL = "of the initial statistics (mean 0, variance 1) is left"
AVERAGED = (
    "The file holds averaged weights (n_averaged). Recompute their statistics over the training set, for "
    "example with torch.optim.swa_utils.update_bn."
)
NO_MOMENTUM = (
    "Its momentum is 0, so training cannot change the statistics. Set a momentum above 0 and train, or "
    "recompute them over the training set."
)
FROZEN = (
    "Its class is frozen: it never updates the statistics. If they were not moved into weight and bias, load "
    "the checkpoint that has them."
)


def rule(code: str) -> Callable[[Find], Rule]:
    """Make a rule of the page of this code and the function that yields hits, in the order of the layers."""
    return lambda find: Rule(**vars(find_page(code)), find=find)


def _by_layer(
    network: Network, found: Tensor, describe: Callable[[Tensor], tuple[Values, str]]
) -> Iterator[Hit]:
    """A hit for every layer with found channels; `describe` gets their positions among all."""
    channels = network.channels
    where = found.nonzero().flatten()
    owners, counts = channels.layer[where].unique_consecutive(return_counts=True)
    for index, positions in zip(owners.tolist(), where.split(counts.tolist()), strict=True):
        values, text = describe(positions)
        numbers = tuple((positions - channels.first[index]).tolist())
        yield Hit(index, numbers, values, text)


def _called(number: float, assumed: bool) -> str:
    """A number in words, and whether it is PyTorch's default because the file tells none."""
    return f"{number:g}{' (assumed)' if assumed else ''}"


def _eps(network: Network, where: Tensor) -> tuple[Values, str]:
    """The eps of the layer that has the channels `where`, as values and in words."""
    position = where[0]
    eps = float(network.channels.eps[position])
    assumed = network.layers[int(network.channels.layer[position])].eps is None
    return {"eps": eps, "eps_assumed": assumed}, f"eps {_called(eps, assumed)}"


def _up_to(where: Tensor) -> str:
    """Before the largest number of the channels `where`."""
    return "" if len(where) == 1 else "up to "


def _lowest(variance: float, where: Tensor) -> str:
    """The smallest running_var of the channels `where`, in words."""
    return f"running_var is {'' if len(where) == 1 else 'as low as '}{variance:.3g}"


@rule("BN001")
def never_updated(network: Network, _: Limits) -> Iterator[Hit]:
    """Every channel at exactly mean 0 and variance 1, or 1 - eps as detectron2 writes it.

    An error only where bncli's record says that training counted batches and nothing else wrote there.
    Elsewhere the statistics may have been absorbed into weight and bias or, with these at 1 and 0, into the
    convolution before: a warning beside a counter, since absorbed networks are usually shipped without; an
    info without a counter, or in a frozen class.
    """
    initial, affine = are_initial(network), have_initial_affine(network)
    counts = [count_of(layer) for layer in network.layers]
    is_new = all(initial) and all(affine) and 0 in counts and not any(counts)
    for index, layer in enumerate(network.layers):
        if initial[index]:
            severity, reason, advice = _judge_initial(layer, has_initial_affine=affine[index], is_new=is_new)
            text = f"running_mean is 0 and running_var is 1 in every channel. {reason}"
            count = layer.num_batches_tracked
            yield Hit(
                index, (), {} if count is None else {"num_batches_tracked": count}, text, severity, advice
            )


def _judge_initial(
    layer: LayerStats, *, has_initial_affine: bool, is_new: bool
) -> tuple[Severity, str, str | None]:
    """Severity, reason and advice for a layer at (0, 1)."""
    count, (momentum, assumed) = max(count_of(layer) or 0, 0), momentum_of(layer)
    stuck = momentum == 0 and not assumed
    advice = AVERAGED if layer.weights_were_averaged else NO_MOMENTUM if stuck else None
    if layer.is_frozen:
        return "info", "That is right if they were moved into weight and bias; else they are lost", FROZEN
    batches = plural(count, "batch", "batches")
    if count and layer.averaged_by_training:
        because = ", as momentum is 0" if stuck else ""
        return "error", f"Training on {batches} did not change them{because}", advice
    own = "The layer has no weight and bias"
    if layer.weight is not None:
        own = "Weight and bias have their initial values too"
    if is_new:
        text = f"{own}, in every layer. No BatchNorm of this network was ever used in train mode, or the"
        return "warning", f"{text} statistics were moved into the layers before", advice
    if count:
        cause = "momentum is 0" if stuck else "they were reset"
        if assumed:
            cause = "momentum was 0, they were reset"
        where = "the layer before" if has_initial_affine else "weight and bias"
        text = f"num_batches_tracked is {count:,}: {cause}, or they were moved into {where}"
        return "warning", text, advice
    if has_initial_affine:
        text = f"{own}. No training reached the layer, it is unused, or its statistics were moved into the"
        return "warning", f"{text} layer before", advice
    if layer.num_batches_tracked is not None:
        text = "Weight and bias were trained. So the statistics are lost, or were moved into weight and bias"
        return "warning", text, advice
    text = "Weight and bias were trained. Probably the statistics were moved into them; else they are lost"
    return "info", text, advice


@rule("BN002")
def initial_residue(network: Network, limits: Limits) -> Iterator[Hit]:
    """More than `residue` of the start is left, if the counter counts the updates of one average.

    Not judged: a cumulative average (its first batch replaces the start), momentum 0 and 1, layers that BN001
    reports, a counter of 0 or none, and one that is no whole number (BN009's: an average of counters counts
    nothing). Nor what the file says was measured. A running_var below the residue excludes it, since a
    variance is never negative. A counter does not say how the average was made: update_bn sets it to 0,
    averages cumulatively and puts momentum back, and a network that went on from a file without counters
    began to count late. So without a record the variances decide, or it is an info.
    """
    residues = _residues(network, limits)
    shown = {residue: _is_shown(network, residues, residue) for residue in set(residues.values())}
    for index, residue in residues.items():
        layer, (momentum, assumed) = network.layers[index], momentum_of(network.layers[index])
        count = layer.num_batches_tracked or 0
        updates = f"{plural(count, 'update')} with momentum {_called(momentum or 0.0, assumed)}"
        left = f"{_percent(residue)} % {INITIAL} after {updates}"
        advice = AVERAGED if layer.weights_were_averaged else None
        severity: Severity = "warning"
        if layer.averaged_by_training:
            decided, text = "record", left
        elif shown[residue]:
            decided, text = "variances", f"{left}. The variances show it too"
        else:
            decided, severity = "nothing", "info"
            text = f"{left}, unless they were recomputed, for example by update_bn"
            advice = advice or (
                "Fine after update_bn, or with momentum None. Else train longer, or recompute the statistics "
                "over the training set."
            )
        values: Values = {
            "residue": residue,
            "num_batches_tracked": count,
            "momentum": momentum or 0.0,
            "momentum_assumed": assumed,
            "decided_by": decided,
        }
        yield Hit(index, (), values, text, severity, advice)


def _residues(network: Network, limits: Limits) -> dict[int, float]:
    """What would be left by layer, if the counter counts updates of one average; where that is possible."""
    found = {}
    for index, (layer, is_initial) in enumerate(zip(network.layers, are_initial(network), strict=True)):
        (momentum, _), count = momentum_of(layer), count_of(layer)
        if momentum is None or not 0 < momentum < 1 or not count or count < 0:
            continue
        if is_initial or layer.was_measured or layer.running_var is None:
            continue
        if not layer.convention.starts_at_0_1:
            continue
        residue = (1 - momentum) ** count
        # float32 averages may round a variance of 0 to slightly below the residue
        if residue > limits["residue"] and not bool((layer.running_var.double() < 0.999 * residue).any()):
            found[index] = residue
    return found


def _is_shown(network: Network, residues: dict[int, float], residue: float) -> bool:
    """Whether at least half of the layers that would hold this residue look like it."""
    layers = [network.layers[index] for index, value in residues.items() if value == residue]
    return 2 * sum(_looks_like(layer, residue) for layer in layers) >= len(layers)


def _looks_like(layer: LayerStats, residue: float) -> bool:
    """Whether the variances are as even as a third of the residue makes them, or lie close above it."""
    if layer.running_var is None:
        return False
    share = share_of_initial(layer)
    close = float(layer.running_var.double().median()) <= 1.25 * residue
    return close or (share is not None and share.at_least >= residue / 3)


@rule("BN003")
def non_finite(network: Network, _: Limits) -> Iterator[Hit]:
    """Exactly the channels in which one of the four numbers is NaN or infinite."""
    channels = network.channels
    has_var = torch.tensor([layer.running_var is not None for layer in network.layers], dtype=torch.bool)
    has_mean = torch.tensor([layer.running_mean is not None for layer in network.layers], dtype=torch.bool)
    broken = {
        "running_mean": ~channels.running_mean.isfinite() & has_mean[channels.layer],
        "running_var": ~channels.running_var.isfinite() & has_var[channels.layer],
        "weight": ~channels.weight.isfinite(),
        "bias": ~channels.bias.isfinite(),
    }

    def describe(where: Tensor) -> tuple[Values, str]:
        counts: Values = {name: int(mask[where].sum()) for name, mask in broken.items() if mask[where].any()}
        in_words = (name if len(where) == 1 else f"{name} ({count})" for name, count in counts.items())
        return counts, f"NaN or infinity in {', '.join(in_words)}"

    yield from _by_layer(network, torch.stack(list(broken.values())).any(0), describe)


@rule("BN004")
def negative_variance(network: Network, _: Limits) -> Iterator[Hit]:
    """Exactly the channels whose running_var is below 0."""
    channels = network.channels

    def describe(where: Tensor) -> tuple[Values, str]:
        low = float(channels.running_var[where].min())
        return {"running_var": low}, _lowest(low, where)

    yield from _by_layer(network, channels.running_var < 0, describe)


@rule("BN005")
def eps_decides(network: Network, limits: Limits) -> Iterator[Hit]:
    """A share eps / (running_var + eps) above `eps_share`; dead channels are BN006's."""
    channels = network.channels
    share = channels.eps / (channels.running_var + channels.eps)
    found = (
        (share > limits["eps_share"]) & (channels.running_var > 0) & ~dead(channels, limits["dead_variance"])
    )

    def describe(where: Tensor) -> tuple[Values, str]:
        low, (values, eps) = float(channels.running_var[where].min()), _eps(network, where)
        return {"running_var": low, **values}, f"{_lowest(low, where)}, with {eps}"

    yield from _by_layer(network, found, describe)


@rule("BN006")
def dead_channel(network: Network, limits: Limits) -> Iterator[Hit]:
    """Weight exactly 0, or a variance below `dead_variance` eps; NaN and below 0 are BN003's and BN004's.

    A warning only where every channel of the layer is dead.
    """
    channels = network.channels
    is_dead = dead(channels, limits["dead_variance"])
    some_alive = network.any_in_layer(~is_dead)

    def describe(where: Tensor) -> tuple[Values, str]:
        zero = int((channels.weight[where] == 0).sum())
        low, (values, eps) = (
            float(channels.running_var[where].nan_to_num(torch.inf).min()),
            _eps(network, where),
        )
        parts = []
        if zero:
            parts.append("weight is 0" if zero == len(where) else f"weight is 0 in {zero}")
        if zero < len(where):
            parts.append(f"{_lowest(low, where)}, with {eps}")
        return {"num_zero_weights": zero, "running_var": low, **values}, "; ".join(parts)

    for hit in _by_layer(network, is_dead, describe):
        yield Hit(
            hit.index, hit.channels, hit.values, hit.text, "info" if some_alive[hit.index] else "warning"
        )


@rule("BN007")
def exploding_gain(network: Network, limits: Limits) -> Iterator[Hit]:
    """A gain above `gain` and above `gain_per_median` medians, or above `gain_limit` in any case.

    How steep the channels of a layer are together says little, since the scale of the weights before
    BatchNorm is free and weight decay shrinks it: nearly all channels of healthy networks stay within 15
    times the median, single dying ones reach 150. A warning where the weight made it, or where it is above
    `gain_limit`; else a variance that was measured did. Dead channels are BN006's.
    """
    channels = network.channels
    gains = gain(channels)
    judged = (channels.running_var > 0) & ~dead(channels, limits["dead_variance"])  # below 0 is BN004's
    found = judged & (gains > limits["gain"]) & gains.isfinite()
    medians, sizes = torch.zeros_like(gains), channels.weight.abs()
    is_large = gains > limits["gain_limit"]
    for index in channels.layer[found].unique().tolist():
        inside = channels.layer == index
        medians[inside] = gains[inside & gains.isfinite()].median()
        is_large[inside] |= (
            sizes[inside] > limits["gain_per_median"] * sizes[inside & sizes.isfinite()].median()
        )
    found &= (gains > limits["gain_per_median"] * medians) | (gains > limits["gain_limit"])

    def describe(where: Tensor) -> tuple[Values, str]:
        high, median, (values, eps) = (
            float(gains[where].max()),
            float(medians[where[0]]),
            _eps(network, where),
        )
        return (
            {"gain": high, "median": median, **values},
            f"the gain is {_up_to(where)}{high:.3g}; the layer's median is {median:.3g}, with {eps}",
        )

    is_harmful = network.any_in_layer(found & is_large)
    for hit in _by_layer(network, found, describe):
        yield replace(hit, severity="warning" if is_harmful[hit.index] else "info")


@rule("BN008")
def switched_off(network: Network, limits: Limits) -> Iterator[Hit]:
    """P(weight * z + bias > 0) below `active_share`, with z normal and of eval mode's deviation.

    The deviation of z is sqrt(var / (var + eps)). In a residual block a ReLU may follow only after the sum; a
    bias nearer to 0 than `off_bias` is therefore not judged: the last BatchNorm of a block that started at
    weight 0 has tiny weights and biases in any ratio (in zero-init ResNets and RegNets up to 0.042 after 60
    steps). Weight 0 is BN006's.
    """
    channels = network.channels
    share = active_share(channels)
    alive = channels.bias.isfinite() & ~dead(channels, limits["dead_variance"])
    found = (share < limits["active_share"]) & (channels.bias <= -limits["off_bias"]) & alive

    def describe(where: Tensor) -> tuple[Values, str]:
        low, (values, _) = float(share[where].min()), _eps(network, where)
        return {"active_share": low, **values}, (
            f"{'only' if len(where) == 1 else 'as few as'} {100 * low:.2g} % of the outputs are above 0"
        )

    yield from _by_layer(network, found, describe)


@rule("BN009")
def counter_type(network: Network, _: Limits) -> Iterator[Hit]:
    """Any type but int64. No rule computes with a counter that is an average."""
    for index, layer in enumerate(network.layers):
        # elsewhere a counter has another type by right
        if layer.counter_dtype not in (None, torch.int64) and layer.convention is PYTORCH:
            name = str(layer.counter_dtype).removeprefix("torch.")
            advice = AVERAGED if layer.weights_were_averaged else None
            severity: Severity = "warning"
            if not layer.counter_dtype.is_floating_point:  # no average makes another whole number
                severity, advice = "info", "Store the counter as int64. The statistics are not affected."
            yield Hit(
                index, (), {"dtype": name}, f"num_batches_tracked is stored as {name}", severity, advice
            )


@dataclass(frozen=True)
class _Deviation:
    """A layer that counts otherwise than most."""

    index: int
    count: int
    usual: int
    multiple: int  # of one in the other; 0: none


def _deviating_counts(network: Network) -> tuple[list[_Deviation], bool, bool]:
    """Such layers; whether the counts fall into a front and a back part; whether the back then has fewer."""
    initial = are_initial(network)
    counts = {
        index: count
        for index, layer in enumerate(network.layers)
        if (count := count_of(layer)) is not None and not initial[index]
    }
    frequency = Counter(counts.values())
    if len(frequency) < 2:
        return [], False, False
    usual = min(frequency, key=lambda count: (-frequency[count], count))
    found = []
    for index, count in counts.items():
        if count != usual:
            small, large = sorted((count, usual))
            exact = small > 0 and large % small == 0 and large // small <= MAX_MULTIPLE
            found.append(_Deviation(index, count, usual, large // small if exact else 0))
    parts = [count for count, _ in groupby(counts.values())]
    return found, len(parts) == 2, len(parts) == 2 and parts[1] < parts[0]


@rule("BN010")
def counter_unequal(network: Network, _: Limits) -> Iterator[Hit]:
    """Counters unlike the number that most layers have (of several, the smallest).

    Not compared are layers without counter, and layers that BN001 reports. An info where the counts fall into
    a front and a back part.
    """
    found, in_two_parts, __ = _deviating_counts(network)
    for one in found:
        if not one.multiple:
            text = f"num_batches_tracked is {one.count:,}, but {one.usual:,} in most layers"
            values: Values = {"num_batches_tracked": one.count, "usual": one.usual}
            yield Hit(one.index, (), values, text, "info" if in_two_parts else "warning")


@rule("BN011")
def counter_multiple(network: Network, _: Limits) -> Iterator[Hit]:
    """Counters that are exactly 2 to MAX_MULTIPLE times that of most layers, or that fraction of it.

    An info where only the last layers have counted fewer: a new head on an older backbone, and the numbers of
    steps were round.
    """
    found, __, back_has_fewer = _deviating_counts(network)
    for one in found:
        if one.multiple:
            times = f"{one.multiple} times" if one.count > one.usual else f"1/{one.multiple} of"
            text = f"num_batches_tracked is {one.count:,}, {times} the {one.usual:,} of most layers"
            values: Values = {"num_batches_tracked": one.count, "usual": one.usual, "multiple": one.multiple}
            yield Hit(one.index, (), values, text, "info" if back_has_fewer else "warning")


@rule("BN012")
def far_mean(network: Network, limits: Limits) -> Iterator[Hit]:
    """|running_mean| / sqrt(running_var) above `mean_in_deviations`; dead channels are BN006's."""
    channels = network.channels
    distance = mean_in_deviations(channels)
    found = (
        (distance > limits["mean_in_deviations"])
        & distance.isfinite()
        & ~dead(channels, limits["dead_variance"])
    )

    def describe(where: Tensor) -> tuple[Values, str]:
        high = float(distance[where].max())
        return {"mean_in_deviations": high}, (
            f"running_mean is {_up_to(where)}{high:.3g} standard deviations away from 0"
        )

    yield from _by_layer(network, found, describe)


@rule("BN013")
def no_running_stats(network: Network, _: Limits) -> Iterator[Hit]:
    """Layers that the file knows to be BatchNorm, and that have no running statistics."""
    for index, layer in enumerate(network.layers):
        if layer.running_mean is None or layer.running_var is None:
            yield Hit(index, (), {}, "The file has no running_mean and running_var for it")


@rule("BN014")
def near_initial(network: Network, limits: Limits) -> Iterator[Hit]:
    """Seven layers in ten hold the share `initial_share` of the start, as their variances show.

    In a real layer the 10 % quantile q of the variances is at most 0.85 times their median m (measured), so
    the share is at least (q - 0.85 m) / 0.15, and at most the smallest variance (`initial.py` has the
    derivation). Reported where nothing lies below 0.5, and where weights show that the network was trained,
    or its counters say that no batch came. At least three layers are needed, except beside such counters,
    where variances have left 1 together, farther than they scatter. The lower bound is rounded down to a
    tenth.

    An input whose variance truly is 1 looks the same, also where a momentum and a counter say that nothing of
    the start is left: an average over a whole module keeps both. So a single layer on standardised features,
    and one that directly follows another BatchNorm (its variances are then that one's squared weights), are
    not judged; a deep and wide chain that keeps the variance of white noise at 1 is reported wrongly. Shares
    below a half, and those that large variances of the data hide, are not found.
    """
    limit = limits["initial_share"]
    shares = _shares(network, limits)
    if not shares or not _was_used(network, shares):
        return
    at_least = float(torch.tensor([share.at_least for share in shares.values()]).quantile(0.3))
    at_most = float(torch.tensor([share.at_most for share in shares.values()]).quantile(0.3))
    if at_least < limit or at_most < max(at_least, MIN_VARIANCE):
        return
    for index, share in shares.items():
        if share.at_least >= limit:
            layer = network.layers[index]
            # few channels may be more even than layers usually are: the bound is rounded down
            low = min(floor(10 * min(share.at_least, at_most)) / 10, 0.9)
            text = (
                f"{100 * low:g} to {_percent(at_most)} % {INITIAL}, as the variances close to 1 show. Or the"
                " layer's inputs really have variance 1"
            )
            values: Values = {"share_at_least": low, "share_at_most": at_most}
            advice = AVERAGED if layer.weights_were_averaged else None
            yield Hit(index, (), values, text, advice=advice)


MIN_VARIANCE = 0.5  # below it BN014 calls nothing "close to 1"
MIN_LAYERS = 3  # fewer may all have an input of variance 1


def _shares(network: Network, limits: Limits) -> dict[int, Share]:
    """The share of (0, 1) by layer, for those that may hold one and that no other rule speaks of."""
    initial, counted = are_initial(network), _residues(network, limits)
    judged = [
        index
        for index, layer in enumerate(network.layers)
        if layer.num_features >= MIN_CHANNELS
        and layer.convention.starts_at_0_1
        and not (initial[index] or index in counted or layer.was_measured or layer.averaged_by_training)
    ]
    # most networks end here, before each layer is looked at
    if not judged or float(network.lowest_variance()[judged].quantile(0.3)) < MIN_VARIANCE:
        return {}
    shares = {}
    for index in judged:
        behind = index > 0 and lies_behind(network.layers[index], network.layers[index - 1])
        share = None if behind else share_of_initial(network.layers[index])
        if share is not None:
            shares[index] = share
    return shares


def _was_used(network: Network, shares: dict[int, Share]) -> bool:
    """Whether the layers belong to a network that was trained, or contradict their own counters."""
    initial_affine = have_initial_affine(network)
    if not all(initial_affine[index] for index in shares):
        return len(shares) >= MIN_LAYERS
    layers = [network.layers[index] for index in shares]
    # the statistics moved, though no batch was counted, or what was counted was averaged too
    contradicted = all(layer.num_batches_tracked is not None and not count_of(layer) for layer in layers)
    return contradicted and all(is_off_1(layer) for layer in layers)


@rule("BN015")
def few_batches(network: Network, limits: Limits) -> Iterator[Hit]:
    """(2 - momentum) / momentum below `effective_batches`, or a counter of 1 that the variances confirm.

    The mirror image, a momentum of 0.001 to 0.01 with few updates, is BN002's and BN014's. An average of
    averages, by a decay that no file tells, is BN014's too.
    """
    initial = are_initial(network)
    for index, layer in enumerate(network.layers):
        if initial[index] or layer.was_measured or layer.running_var is None:
            continue
        if layer.weights_were_averaged:  # an average of averages, by a decay that no file tells: BN014's
            continue
        momentum, assumed = momentum_of(layer)
        text = None if assumed else describe_large_momentum(momentum, limits["effective_batches"])
        if text is not None and momentum is not None:
            unless = "" if layer.averaged_by_training else ", unless they were recomputed"
            values: Values = {"momentum": momentum, "effective_batches": (2 - momentum) / momentum}
            yield Hit(index, (), values, text + unless)
        elif count_of(layer) == 1 and limits["effective_batches"] > 1 and _holds_one_batch(layer):
            how = "momentum is None"
            if momentum is not None:
                how = f"less {INITIAL} than momentum {_called(momentum, assumed)} leaves"
            text = (
                f"num_batches_tracked is 1, and {how}. So the statistics are those of one batch, unless they"
            )
            text += " were loaded or averaged"
            yield Hit(index, (), {"num_batches_tracked": 1}, text, "info", ONE_BATCH)


ONE_BATCH = "Fine if that batch was large. Else recompute the statistics over more of the training set."


def _holds_one_batch(layer: LayerStats) -> bool:
    """Whether one update replaced what was there: by a cumulative average, or by the numbers."""
    momentum, _ = momentum_of(layer)
    if not momentum or layer.running_var is None:
        return momentum is None
    return bool((layer.running_var.double() < 0.999 * (1 - momentum)).any())


def _percent(share: float) -> str:
    """Two digits, three where they are more than 99: never 1e+02."""
    rounded = f"{100 * share:.2g}"
    return f"{100 * share:.3g}" if "e+" in rounded else rounded


def describe_large_momentum(momentum: float | None, effective_batches: float = 2.0) -> str | None:
    """What a momentum too large does to the statistics, in words; None for one that is not."""
    if not momentum or (2 - momentum) / momentum >= effective_batches:
        return None
    batches = (2 - momentum) / momentum
    in_words = f"{batches:.3g} batches" if batches > 1 else "the last batch"
    return f"with momentum {momentum:g} the statistics are in effect those of {in_words}"


RULES = tuple(found for found in tuple(globals().values()) if isinstance(found, Rule))
DEFAULT_THRESHOLDS = {threshold.name: threshold.default for rule in RULES for threshold in rule.thresholds}


def find_rule(code_or_name: str) -> Rule:
    """The rule of a code such as BN003, in either case, or of a name such as non_finite.

    Raises BncliError, with the list, for anything else.
    """
    code = find_page(code_or_name).code
    return next(found for found in RULES if found.code == code)
