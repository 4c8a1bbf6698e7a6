"""The rules of the audit: one function each, and all there is to say about it beside it.

To add a rule, write a function here. It gets the layers of a network and yields a `Hit` per layer, in order;
`rule` gives it code, severity, summary, advice and thresholds. Its docstring is the page of
`bncli inspect-stats --explain`. The list in the README, the findings and that page are made from this file.
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
from bncli.batchnorm.audit.rule_definition import Hit, Limits, Rule, Severity, Threshold, Values, rule
from bncli.batchnorm.layers import LayerStats
from bncli.errors import BncliError
from bncli.wording import plural

MAX_MULTIPLE = 8  # updates per step that BN011 knows; beyond, two counters are a multiple by chance

RECOMPUTE = "recompute the statistics over the training set"
AVERAGED = (
    "The file holds averaged weights (n_averaged): recompute their statistics over the training set, as "
    "torch.optim.swa_utils.update_bn does."
)
NO_MOMENTUM = (
    "Its momentum is 0, so training cannot move the statistics: set one above 0 and train, or recompute them."
)
FROZEN = (
    "Its class is frozen and never updates them: fine if they were absorbed into weight and "
    "bias; else load the "
    "checkpoint that has them."
)


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


@rule(
    "BN001",
    "error",
    "mean exactly 0 and variance exactly 1, as initialised",
    advice="Run training batches through the network in train mode, or load the checkpoint that has "
    "the statistics.",
)
def never_updated(network: Network, _: Limits) -> Iterator[Hit]:
    """A BatchNorm layer starts with running_mean 0 and running_var 1. Each batch in train mode moves them by
    running = (1 - momentum) * running + momentum * batch. No real batch leaves every channel at exactly 0 and
    1, so such values were never updated, or were put back: in eval mode the layer does not normalise at all.
    The usual causes are weights that were loaded with strict=False and found no buffer of that name, a layer
    that training never reached, momentum 0, and averaged weights whose buffers nobody averaged. The one
    harmless cause: the statistics were absorbed into weight and bias, as detection frameworks do before they
    freeze a network. detectron2 then writes 1 - eps for the variance, which counts as 1 here.

    Knows: It is an error where bncli's own training made the statistics: its record says that batches were
    averaged, and nothing else wrote there.

    Cannot know: Trained weights beside (0, 1) look the same whether the statistics were lost or absorbed,
    into weight and bias or, with these at 1 and 0, into the convolution before. With a counter that is a
    warning, since absorbed networks are usually shipped without; without a counter, or in a frozen class, it
    is an info. One new layer in a trained network may be unused.

    Source: PyTorch documentation, torch.nn.BatchNorm2d; kuangliu/pytorch-cifar#162 (a load that loads
    nothing)
    """
    initial, affine = are_initial(network), have_initial_affine(network)
    counts = [count_of(layer) for layer in network.layers]
    is_new = all(initial) and all(affine) and 0 in counts and not any(counts)
    for index, layer in enumerate(network.layers):
        if initial[index]:
            severity, reason, advice = _judge_initial(layer, has_initial_affine=affine[index], is_new=is_new)
            text = f"running_mean is 0 and running_var is 1 in every channel; {reason}"
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
        return "info", "right if they were absorbed into weight and bias, unless they were lost", FROZEN
    batches = plural(count, "batch", "batches")
    if count and layer.averaged_by_training:
        because = ", because momentum is 0" if stuck else ""
        return "error", f"{batches} in train mode left no trace{because}", advice
    own = "weight and bias are initial too" if layer.weight is not None else "it has no weight and bias"
    if is_new:
        text = f"{own}, in every layer: no BatchNorm of this network was ever used in train mode"
        return "warning", f"{text}, unless the layers before absorbed them", advice
    if count:
        cause = "momentum is 0" if stuck else "they were put back"
        if assumed:
            cause = "momentum was 0 or they were put back"
        where = "the layer before" if has_initial_affine else "weight and bias"
        return "warning", f"after {batches}: {cause}, unless they were absorbed into {where}", advice
    if has_initial_affine:
        text = f"{own}: no training reached the layer, unless it is unused or the layer before absorbed them"
        return "warning", text, advice
    if layer.num_batches_tracked is not None:
        text = (
            "weight and bias are not initial: the statistics are lost, unless they were absorbed into these"
        )
        return "warning", text, advice
    return (
        "info",
        "they were absorbed into weight and bias, which are not initial, unless they were lost",
        advice,
    )


@rule(
    "BN002",
    "warning",
    "too few updates: part of the statistics is still the initial (0, 1)",
    advice="Train longer, raise momentum, or recompute the statistics over the training set.",
    thresholds=(
        Threshold(
            "residue",
            0.01,
            "largest fraction of (0, 1) left",
            "1 % of the initial 1 moves the deviation by 0.25 % beside a variance of 2, by 4 % "
            "beside 0.1, about as "
            "much as a moving average scatters; momentum 0.1 needs 44 updates for it",
        ),
    ),
)
def initial_residue(network: Network, limits: Limits) -> Iterator[Hit]:
    """An exponential average that starts at (0, 1) still holds the fraction r = (1 - momentum) ^
    num_batches_tracked of its start: running_var = (1 - r) * average + r. Eval mode then normalises partly by
    numbers that no image had. Where momentum was constant the residue can be removed without data: mean / (1
    - r) and (var - r) / (1 - r). Not judged are a cumulative average (momentum None: its first batch replaces
    the start), momentum 0 and 1, layers that BN001 reports, a counter of 0 or none, and a counter that is no
    whole number (BN009's: an average of counters counts nothing).

    Knows: It is certain where a checkpoint of bncli's says that training alone made the statistics; what it
    says was measured is not judged. Elsewhere the numbers may decide. A running_var below r excludes the
    residue, since a variance is never negative. Variances that lie close above r, or differ less than those
    of a real layer would, show it: a warning.

    Cannot know: A counter does not say how the average was made. torch.optim.swa_utils.update_bn sets it to
    0, averages cumulatively and puts momentum back, so that 25 stands beside a complete average; a network
    that went on from a file without counters began to count late. A state dict stores no momentum: PyTorch's
    default 0.1 is assumed there and called so. Where the numbers leave it open, it is an info.

    Source: PyTorch documentation, torch.nn.BatchNorm2d; the same bias as of Adam's averages: Kingma and Ba
    2015, arXiv:1412.6980, section 3
    """
    residues = _residues(network, limits)
    shown = {residue: _is_shown(network, residues, residue) for residue in set(residues.values())}
    for index, residue in residues.items():
        layer, (momentum, assumed) = network.layers[index], momentum_of(network.layers[index])
        count = layer.num_batches_tracked or 0
        after = f"after {count} updates with momentum {_called(momentum or 0.0, assumed)}"
        advice = AVERAGED if layer.weights_were_averaged else None
        severity: Severity = "warning"
        if layer.averaged_by_training:
            decided, text = "record", f"{residue:.2g} of (0, 1) is left {after}"
        elif shown[residue]:
            decided, text = "variances", f"{residue:.2g} of (0, 1) is left {after}, and the variances show it"
        else:
            decided, severity = "nothing", "info"
            text = f"{residue:.2g} of (0, 1) is left {after}, unless they were recomputed, e.g. by update_bn"
            advice = (
                advice
                or "Fine after update_bn or momentum None; else train longer, or recompute the statistics."
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


@rule(
    "BN003",
    "error",
    "a NaN or an infinity in `running_mean`, `running_var`, `weight` or `bias`",
    advice="Go back to a checkpoint without it; under mixed precision keep the activations inside the range.",
)
def non_finite(network: Network, _: Limits) -> Iterator[Hit]:
    """Eval mode computes weight * (x - running_mean) / sqrt(running_var + eps) + bias. One NaN among them
    makes that channel NaN for every image; an infinite variance makes it constant. Train mode does not read
    the running statistics, so training goes on and the loss looks healthy: the damage shows in evaluation
    only, and it stays, because NaN times (1 - momentum) is NaN. The usual cause is float16: an activation
    overflows, the gradient scaler skips the optimiser's step, but the forward pass has already updated the
    buffers. Another is a batch with one value per channel, whose unbiased variance is 0 / 0.

    Knows: The channels, exactly: no network computes with such numbers.

    Cannot know: When it happened, and whether other checkpoints of the run have it.

    Source: pytorch#88474 and pytorch#115500 (mixed precision)
    """
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
        return counts, ", ".join(f"{count} in {name}" for name, count in counts.items())

    yield from _by_layer(network, torch.stack(list(broken.values())).any(0), describe)


@rule(
    "BN004",
    "error",
    "a `running_var` below 0",
    advice="Recompute the statistics over the training set; do not extrapolate or subtract running "
    "statistics.",
)
def negative_variance(network: Network, _: Limits) -> Iterator[Hit]:
    """Batch variances are never negative and running_var is a weighted average of them, so no training
    reaches a value below 0. Below -eps the square root in eval mode is NaN; above it the output merely has
    the wrong scale. It comes from arithmetic on checkpoints: differences or extrapolations of weights (task
    vectors, weight averages with negative factors) applied to the buffers too; from E[x^2] - E[x]^2 in
    float32, which cancels where the mean is large; or from loaders that subtract eps.

    Knows: No average of variances is negative: the numbers are wrong, whoever made them.

    Cannot know: Which of the other channels were changed as well, and stayed above 0.

    Source: timgaripov/swa#8 (down to -31.9 after averaging); facebookresearch/detectron2#3160 (subtracting
    eps)
    """
    channels = network.channels

    def describe(where: Tensor) -> tuple[Values, str]:
        low = float(channels.running_var[where].min())
        return {"running_var": low}, f"running_var down to {low:.3g}"

    yield from _by_layer(network, channels.running_var < 0, describe)


@rule(
    "BN005",
    "info",
    "a variance so small that eps, not the data, sets the scale",
    advice="Make sure that eps is the one used in training wherever the network is rebuilt; else prune "
    "the channels.",
    thresholds=(
        Threshold(
            "eps_share",
            0.5,
            "largest share of eps in running_var + eps",
            "from one half on, eps contributes more than the data to what the layer divides by",
        ),
    ),
)
def eps_decides(network: Network, limits: Limits) -> Iterator[Hit]:
    """BatchNorm divides by sqrt(running_var + eps). eps is there against division by zero; where it is larger
    than the variance, the layer's scale is a constant of the code instead of a property of the data, and the
    output's deviation, sqrt(var / (var + eps)), falls below 0.71 of what weight says. Train and eval mode
    agree on that, so nothing is broken yet. But a state dict does not store eps: rebuilt with another one
    (1e-5 in PyTorch, 1e-3 in Keras and MobileNetV3) these channels change their scale by up to a factor of
    10, while all others stay as they are. Small variances are common behind depthwise convolutions and under
    weight decay, in published networks too. Dead channels are BN006's.

    Knows: The share that eps has, where the file tells eps. It is a fact and harms nothing as long as eps
    stays.

    Cannot know: A state dict leaves eps unknown; PyTorch's 1e-5 is assumed then and called so. With a larger
    one more channels would be listed.

    Source: Ioffe and Szegedy 2015, Batch Normalization, arXiv:1502.03167, algorithm 1; pytorch#173337 (eps
    may not be 0)
    """
    channels = network.channels
    share = channels.eps / (channels.running_var + channels.eps)
    found = (
        (share > limits["eps_share"]) & (channels.running_var > 0) & ~dead(channels, limits["dead_variance"])
    )

    def describe(where: Tensor) -> tuple[Values, str]:
        low, (values, eps) = float(channels.running_var[where].min()), _eps(network, where)
        return {"running_var": low, **values}, f"running_var down to {low:.3g} with {eps}"

    yield from _by_layer(network, found, describe)


@rule(
    "BN006",
    "warning",
    "a `weight` of exactly 0, or a variance far below eps: the output hardly depends on the image",
    advice="Prune the channel, or look for what silenced it: a dead ReLU before it, weight decay on "
    "BatchNorm.",
    thresholds=(
        Threshold(
            "dead_variance",
            0.01,
            "a running_var below this many eps is dead",
            "at var = eps / 100 the normalised deviation sqrt(var / (var + eps)) is 0.1, a "
            "tenth of its purpose",
        ),
    ),
)
def dead_channel(network: Network, limits: Limits) -> Iterator[Hit]:
    """With weight exactly 0 the output is bias, whatever the image shows. With a variance of less than eps /
    100 the normalised value has a deviation sqrt(var / (var + eps)) below 0.1 where BatchNorm exists to make
    it 1. Either way the channel costs time and says almost nothing. Typical causes are a dead ReLU or a
    zeroed filter before the layer, an input that is constant in the training set, and weight decay on
    BatchNorm, which drives weight and filter to 0 together. Structured pruning does it on purpose. A residual
    network built with zero_init_residual starts with weight 0 in the last BatchNorm of every block, until its
    first step. NaN and negative variances are BN003's and BN004's.

    Knows: Weight 0 is certain. Single dead channels are a fact about many published networks (MobileNetV2,
    EfficientNet-Lite0) and harm none of them: an info. A layer that is dead as a whole is a warning.

    Cannot know: Whether it was meant so. Where eps is unknown PyTorch's 1e-5 is assumed, and called so.

    Source: Zhou et al. 2020, How Does BN Increase Collapsed Neural Network Filters?, arXiv:2001.11216
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
        beside = f" with {eps}" if zero < len(where) else ""
        return (
            {"num_zero_weights": zero, "running_var": low, **values},
            f"weight 0 in {zero}, running_var down to {low:.3g}{beside}",
        )

    for hit in _by_layer(network, is_dead, describe):
        yield Hit(
            hit.index, hit.channels, hit.values, hit.text, "info" if some_alive[hit.index] else "warning"
        )


@rule(
    "BN007",
    "warning",
    "|weight| / sqrt(running_var + eps) far above that of the layer's other channels",
    advice="Compare outputs in train and eval mode; recompute the statistics, keep the layer in "
    "float32, or prune.",
    thresholds=(
        Threshold(
            "gain",
            100.0,
            "a gain up to this is never reported",
            "a float16 activation near 1 is rounded by 0.0005; times 100 that is 5 % of a deviation",
        ),
        Threshold(
            "gain_per_median",
            30.0,
            "nor one up to this many times the layer's median",
            "the scale of a whole layer is free (weight decay shrinks it); nearly all channels of healthy "
            "networks stay within 15 times the median, single dying ones reach 150",
        ),
        Threshold(
            "gain_limit",
            65504.0,
            "above this always, whatever the median",
            "the largest float16: multiplied into a convolution's weights it overflows",
        ),
    ),
)
def exploding_gain(network: Network, limits: Limits) -> Iterator[Hit]:
    """In eval mode a channel is a straight line: its slope |weight| / sqrt(running_var + eps) multiplies
    whatever differs from running_mean, the noise of a short float format and the shift between training and
    use as well as the signal. In train mode a shift of the whole batch cancels; in eval mode it comes out
    times the slope. How steep the channels of a layer are together says little, since the scale of the
    weights before BatchNorm is free and weight decay shrinks it; so the limit is relative: one channel far
    steeper than its neighbours had nearly no variance in training, or a weight that ran away. Dead channels
    are BN006's.

    Knows: The slope, exactly where eps is known, and which of the two made it. A weight that ran away, or a
    slope that overflows float16, is a warning. Nearly no variance is an info: it was measured, so the output
    is normalised as in training.

    Cannot know: Whether inputs ever come that differ from training's. Where eps is unknown PyTorch's 1e-5 is
    assumed; a larger one makes the slope smaller, by a factor of 10 at most with 1e-3.

    Source: van Laarhoven 2017, L2 Regularization versus Batch and Weight Normalization, arXiv:1706.05350
    (free scale)
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
            f"gain up to {high:.3g}, median of the layer {median:.3g}, with {eps}",
        )

    is_harmful = network.any_in_layer(found & is_large)
    for hit in _by_layer(network, found, describe):
        yield replace(hit, severity="warning" if is_harmful[hit.index] else "info")


@rule(
    "BN008",
    "info",
    "under a normal model hardly any output is above 0: a ReLU behind it passes nothing",
    advice="Harmless where no ReLU follows. Else the channel can be pruned; training at a lower rate "
    "avoids it.",
    thresholds=(
        Threshold(
            "active_share",
            1e-6,
            "smallest share of outputs above 0",
            "one in a million, bias = -4.75 deviations: one position in 80 maps of 112 x 112",
        ),
        Threshold(
            "off_bias",
            0.1,
            "smallest -bias that is judged",
            "blocks that start at weight 0 have tiny weights and biases in any ratio: in "
            "zero-init ResNets and "
            "RegNets up to 0.042 after 60 steps",
        ),
    ),
)
def switched_off(network: Network, limits: Limits) -> Iterator[Hit]:
    """If the normalised input z of a channel were normal, the share of outputs above 0 would be P(weight * z
    + bias > 0) = Phi(bias / (|weight| * s)) with s = sqrt(var / (var + eps)). Where that is nearly 0, a ReLU
    behind the layer passes nothing, in train mode as in eval mode, and no gradient comes back to change it.
    In a residual block a ReLU may follow only after the sum; a bias of less than a tenth is therefore not
    judged, because the last BatchNorm of a block that started at weight 0 (zero_init_residual) has tiny
    weights and biases in any ratio. Weight 0 is BN006's.

    Knows: The share under the model. Both modes agree on it, so nothing is computed wrongly: an info.

    Cannot know: Real activations have longer tails than the model, and a checkpoint does not say whether a
    ReLU follows. Many healthy networks have such channels. Where eps is unknown 1e-5 is assumed.

    Source: Lu et al. 2019, Dying ReLU and Initialization, arXiv:1903.06733
    """
    channels = network.channels
    share = active_share(channels)
    alive = channels.bias.isfinite() & ~dead(channels, limits["dead_variance"])
    found = (share < limits["active_share"]) & (channels.bias <= -limits["off_bias"]) & alive

    def describe(where: Tensor) -> tuple[Values, str]:
        low, (values, _) = float(share[where].min()), _eps(network, where)
        return {"active_share": low, **values}, f"the share of outputs above 0 is down to {low:.2g}"

    yield from _by_layer(network, found, describe)


@rule(
    "BN009",
    "warning",
    "`num_batches_tracked` is not int64: somebody averaged or converted it",
    advice="Recompute the statistics of averaged weights over the training set; store the counter as int64.",
)
def counter_type(network: Network, _: Limits) -> Iterator[Hit]:
    """num_batches_tracked is an int64 scalar in every BatchNorm that PyTorch makes, and casts such as
    model.half() leave it alone. A float means that somebody did arithmetic on the whole state dict: the mean
    of several checkpoints, an exponential average of weights, a conversion. Then the running statistics
    beside it are averages too, and they belong to none of the networks: the activations of averaged weights
    have another mean and variance than the average of the activations' means and variances. PyTorch loads
    such a counter without a word, rounded down.

    Knows: The type, which training never changes. A counter that is an average counts nothing, and no rule
    computes with it.

    Cannot know: Whether the statistics were recomputed since, with the counter left as it was; and how far
    averages are from the truth: often little, where the averaged networks lie close to each other.

    Source: Izmailov et al. 2018, Averaging Weights Leads to Wider Optima, arXiv:1803.05407;
    torch.optim.swa_utils.update_bn
    """
    for index, layer in enumerate(network.layers):
        if layer.counter_dtype not in (None, torch.int64):
            name = str(layer.counter_dtype).removeprefix("torch.")
            advice = AVERAGED if layer.weights_were_averaged else None
            severity: Severity = "warning"
            if not layer.counter_dtype.is_floating_point:  # no average makes another whole number
                severity, advice = "info", "Store the counter as int64; the statistics are not concerned."
            yield Hit(index, (), {"dtype": name}, f"num_batches_tracked is {name}", severity, advice)


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


@rule(
    "BN010",
    "warning",
    "`num_batches_tracked` differs from that of most layers",
    advice="Fine if the layer was frozen, added later or used only now and then; else look why it "
    "missed batches.",
)
def counter_unequal(network: Network, _: Limits) -> Iterator[Hit]:
    """Every layer that takes part in every training batch has counted the same number. One that has counted
    fewer was frozen for a while (eval mode), was added later, loaded from elsewhere, or is used only in some
    batches; with more it may have gone on in train mode while somebody believed it frozen:
    requires_grad=False stops the optimiser but not the running statistics, and model.train() takes a frozen
    layer out of eval mode again. Compared is with the number that most layers have (of several, the
    smallest). Not compared are layers without counter, and layers that BN001 reports.

    Knows: That the layers did not see the same batches, or that a counter was put back.

    Cannot know: Whether it was meant so. Fine-tuning with a frozen backbone looks like an accident that froze
    it.

    Source: pytorch#86590 and pytorch#66073 (frozen BatchNorm)
    """
    found, in_two_parts, __ = _deviating_counts(network)
    for one in found:
        if not one.multiple:
            text = f"num_batches_tracked {one.count}, {one.usual} in most layers"
            values: Values = {"num_batches_tracked": one.count, "usual": one.usual}
            yield Hit(one.index, (), values, text, "info" if in_two_parts else "warning")


@rule(
    "BN011",
    "warning",
    "`num_batches_tracked` is a multiple of that of most layers, or a fraction",
    advice="Shared layer: give each use its own BatchNorm. Activation checkpointing: use momentum 1 - "
    "sqrt(1 - m).",
)
def counter_multiple(network: Network, _: Limits) -> Iterator[Hit]:
    """A layer that has counted exactly k times as many batches as the others (k from 2 to 8) was updated k
    times per step. Two causes are common. A layer that is used several times in one forward pass (a shared
    head, the two views of a siamese network) mixes the statistics of all its uses, and eval mode normalises
    each use by the mixture. Activation checkpointing runs the forward pass again for the backward pass: the
    same batch counts twice, so momentum m acts as 1 - (1 - m)^2. An exact fraction is the same seen from the
    other side: most layers are updated k times, or this one in every k-th step.

    Knows: The ratio of the counters, exactly. Where only the last layers have counted fewer it is an info: a
    new head on an older backbone, and the numbers of steps were round.

    Cannot know: Which of the causes it is; and a layer that was frozen for exactly half of the batches looks
    the same.

    Source: pytorch#96136 (checkpointing updates twice)
    """
    found, __, back_has_fewer = _deviating_counts(network)
    for one in found:
        if one.multiple:
            times = f"{one.multiple} times" if one.count > one.usual else f"1/{one.multiple} of"
            text = f"num_batches_tracked {one.count}, {times} the {one.usual} of most layers"
            values: Values = {"num_batches_tracked": one.count, "usual": one.usual, "multiple": one.multiple}
            yield Hit(one.index, (), values, text, "info" if back_has_fewer else "warning")


@rule(
    "BN012",
    "warning",
    "a mean so many deviations from 0 that short floats cannot resolve the deviations",
    advice="Keep the layer and its input in float32, or take the offset away before it (centre the input).",
    thresholds=(
        Threshold(
            "mean_in_deviations",
            64.0,
            "largest |running_mean| / sqrt(running_var)",
            "neighbouring bfloat16 numbers around 64 deviations are half a deviation apart",
        ),
    ),
)
def far_mean(network: Network, limits: Limits) -> Iterator[Hit]:
    """Eval mode subtracts running_mean from activations that lie around it. If the mean is many deviations
    away from 0, most digits of every activation are spent on the offset: near 64 deviations the numbers of
    bfloat16 (8 significant bits) are half a deviation apart, near 512 those of float16 (11 bits). What is
    rounded away before the layer cannot come back, and the variance that training measured is partly that of
    the rounding. It happens to inputs that were never centred, behind layers with a large bias, and in
    channels that hardly vary. float32 (24 bits) is safe up to millions. Dead channels are BN006's.

    Knows: The distance, and what each format can resolve at it.

    Cannot know: In which format the network runs; in float32 it is harmless.

    Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, section 1.7 (cancellation); Ioffe and
    Szegedy 2015, arXiv:1502.03167
    """
    channels = network.channels
    distance = mean_in_deviations(channels)
    found = (
        (distance > limits["mean_in_deviations"])
        & distance.isfinite()
        & ~dead(channels, limits["dead_variance"])
    )

    def describe(where: Tensor) -> tuple[Values, str]:
        high = float(distance[where].max())
        return {"mean_in_deviations": high}, f"mean up to {high:.3g} deviations from 0"

    yield from _by_layer(network, found, describe)


@rule(
    "BN013",
    "error",
    "the layer keeps none (`track_running_stats=False`): eval mode uses batch statistics too",
    advice="Set track_running_stats=True and train, or take a normalisation that needs no batch (GroupNorm).",
)
def no_running_stats(network: Network, _: Limits) -> Iterator[Hit]:
    """With track_running_stats=False the layer has no running_mean and running_var, and eval mode normalises
    by the statistics of the batch at hand, as train mode does. The prediction for one image then depends on
    the images beside it, and on the order in which they come; batches of one image lose what the layer's
    channels have in common, and without spatial positions they are refused ("Expected more than 1 value per
    channel"). It may be meant so, in style transfer or test-time adaptation; then --ignore this rule.

    Knows: Checkpoints that know their network: bncli's own, and whole pickled modules.

    Cannot know: A state dict of such a layer has no trace of BatchNorm, so that it is not found there.

    Source: PyTorch documentation, torch.nn.BatchNorm2d; pytorch#156051
    """
    for index, layer in enumerate(network.layers):
        if layer.running_mean is None or layer.running_var is None:
            yield Hit(index, (), {}, "no running_mean and running_var")


@rule(
    "BN014",
    "warning",
    "most layers have even variances close to 1: much of the statistics is still the initial (0, 1)",
    advice="Recompute the statistics over the training set; then average weights alone, raise momentum, or "
    "update more often.",
    thresholds=(
        Threshold(
            "initial_share",
            0.3,
            "smallest share of (0, 1) that is reported, if seven layers in ten show it",
            "chosen on the healthy networks at hand; none of them shows 0.1 that has no input of variance 1",
        ),
    ),
)
def near_initial(network: Network, limits: Limits) -> Iterator[Hit]:
    """What still holds the share s of its start has running_var = s + (1 - s) * b with b >= 0: no variance
    lies below s, and they differ by the factor 1 - s less than those of the data. An exponential average over
    a whole state dict does that: with decay 0.9999 it holds 95 % of (0, 1) after 500 steps, and its counter
    is 0, a float, or large (timm's ModelEmaV2 and V3). So does momentum 0.001 where a state dict does not
    tell it. In a real layer the 10 % quantile of the variances is at most 0.85 times their median (measured);
    with q for the one and m for the other s is then at least (q - 0.85 m) / 0.15, and at most the smallest
    variance.

    Knows: It is reported where seven layers in ten agree on a share, nothing lies below 0.5, and weights show
    that the network was trained, or its counters say that no batch came. At least three layers are needed,
    except beside such counters, where variances have left 1 together, farther than they scatter. The share is
    given as these bounds, the lower one rounded down to a tenth.

    Cannot know: Inputs whose variance truly is 1, also where a momentum and a counter say that nothing of (0,
    1) is left: an average over a whole module keeps both. So a single layer on standardised features, and one
    that directly follows another BatchNorm (its variances are then that one's squared weights), are not
    judged; a deep and wide chain that keeps the variance of white noise at 1 is reported wrongly. That real
    layers are less even is measured, not proved. Shares below a half, and those that large variances of the
    data hide, are not found.

    Source: PyTorch documentation, torch.nn.BatchNorm2d; huggingface/pytorch-image-models#245 and #1182
    (averaged buffers)
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
                f"between {low:g} and {at_most:.2g} of (0, 1) is left, as the variances close to 1 show,"
                " unless the layer's inputs truly have variance 1"
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


@rule(
    "BN015",
    "warning",
    "the statistics are those of hardly more than one batch",
    advice="PyTorch's momentum is the weight of the new batch: TensorFlow's and Keras's 0.99 is 0.01 here, "
    "ONNX's 0.9 is 0.1. Recompute the statistics over the training set.",
    thresholds=(
        Threshold(
            "effective_batches",
            2.0,
            "fewer batches than this in effect, (2 - momentum) / momentum",
            "momentum 0.67 is the limit: the last batch then counts twice as much as all before it; "
            "recipes for short runs take 0.4 to 0.6 on purpose",
        ),
    ),
)
def few_batches(network: Network, limits: Limits) -> Iterator[Hit]:
    """running = (1 - momentum) * running + momentum * batch gives the last batch the weight momentum, the one
    before it momentum * (1 - momentum), and so on. The mean of a channel then scatters like that of (2 -
    momentum) / momentum batches: 19 with 0.1, 3 with 0.5, 1.02 with 0.99. TensorFlow and Keras (0.99) and
    ONNX (0.9) mean the weight of the old value by the same word; taken over unconverted, training looks the
    same (it does not read these statistics), and eval mode normalises by whatever came last. A cumulative
    average (momentum None, update_bn) of a single batch is no better. The mirror image, 0.001 to 0.01 with
    few updates, is BN002's and BN014's.

    Knows: The momentum, from checkpoints of bncli's and whole pickled modules; in bncli's own also whether
    the statistics were measured since. A counter of 1 beside a variance that an average with momentum 0.1
    cannot have reached is the trace of one batch, and an info.

    Cannot know: A state dict has no momentum, and the numbers of one batch look like those of many.
    Statistics that were recomputed since, by update_bn for example, are right whatever momentum says; and a
    single batch may have been the whole training set, or have come after statistics that were loaded without
    counter.

    Source: PyTorch documentation, torch.nn.BatchNorm2d; Keras documentation, BatchNormalization (momentum of
    the moving average)
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
            unless = "" if layer.averaged_by_training else ", unless they were recomputed, e.g. by update_bn"
            values: Values = {"momentum": momentum, "effective_batches": (2 - momentum) / momentum}
            yield Hit(index, (), values, text + unless)
        elif count_of(layer) == 1 and limits["effective_batches"] > 1 and _holds_one_batch(layer):
            how = "momentum is None"
            if momentum is not None:
                how = f"less of (0, 1) is left than momentum {_called(momentum, assumed)} leaves"
            text = f"one batch was counted and {how}: they are that batch's, unless loaded or averaged"
            yield Hit(index, (), {"num_batches_tracked": 1}, text, "info", ONE_BATCH)


ONE_BATCH = "Fine if that batch was large; else recompute the statistics over more of the training set."


def _holds_one_batch(layer: LayerStats) -> bool:
    """Whether one update replaced what was there: by a cumulative average, or by the numbers."""
    momentum, _ = momentum_of(layer)
    if not momentum or layer.running_var is None:
        return momentum is None
    return bool((layer.running_var.double() < 0.999 * (1 - momentum)).any())


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
    for found in RULES:
        if code_or_name.strip().lower() in (found.code.lower(), found.name):
            return found
    known = ", ".join(f"{found.code} {found.name}" for found in RULES)
    raise BncliError(f"there is no rule {code_or_name.strip()!r}; there are {known}")
