"""BatchNorm folded into the convolution before it, which eval mode makes possible: one layer less to compute.

In eval mode BatchNorm is one affine map per channel, and a convolution followed by an affine map is a
convolution. Average pooling in between changes nothing about that (its weights sum to 1), nor does max
pooling where the map increases. Folding changes the last bits of every output.
"""

import copy
from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode without the BatchNorm layers that can be folded away; `model` is left alone.

    Folded is a BatchNorm layer that directly follows a convolution in an `nn.Sequential`, or one with a
    pooling between them. The convolution takes its place in eval mode, and `nn.Identity` that of the
    BatchNorm layer. Left as they are: layers with hooks, layers or weights that are used twice, layers
    without running statistics, max pooling before a map with a negative weight, and every network that
    is not made of plain `nn.Sequential`s at that place.
    """
    folded = copy.deepcopy(model).eval()
    uses = Counter(
        id(part)
        for _, module in folded.named_modules(remove_duplicate=False)
        for part in (module, *module.parameters(recurse=False))
    )
    for sequence in list(folded.modules()):
        if not isinstance(sequence, nn.Sequential) or type(sequence).forward is not nn.Sequential.forward:
            continue
        names = list(sequence._modules)
        # neighbours first, then those with a pooling between them
        pairs: list[tuple[str, str | None, str]] = [(a, None, b) for a, b in pairwise(names)]
        pairs += [(a, b, c) for a, b, c in zip(names, names[1:], names[2:], strict=False)]
        for first, between, last in pairs:
            convolution, norm = sequence._modules[first], sequence._modules[last]
            pool = None if between is None else sequence._modules[between]
            layers = [layer for layer in (convolution, pool, norm) if layer is not None]
            if all(_is_plain(layer, uses) for layer in layers) and _can_fold(convolution, pool, norm):
                _fold(convolution, norm)
                sequence._modules[last] = nn.Identity().eval()
    return folded


def _is_plain(layer: nn.Module, uses: Counter[int]) -> bool:
    """Whether a layer is used at one place, shares no weight, and nothing watches it."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    once = all(uses[id(part)] == 1 for part in (layer, *layer.parameters(recurse=False)))
    return once and not any(hooks)


def _can_fold(convolution: Any, pool: Any, norm: Any) -> bool:
    # exact types: a subclass may compute something else
    if type(convolution) not in _CONVOLUTIONS or type(norm) is not _CONVOLUTIONS[type(convolution)]:
        return False
    if norm.running_mean is None or norm.running_var is None:
        return False
    if norm.num_features != convolution.out_channels:
        return False
    if pool is None:
        return True
    if type(pool) in _AVG_POOLS:
        has_divisor = getattr(pool, "divisor_override", None) is not None
        is_padded = pool.count_include_pad and any(_numbers(pool.padding))
        return not has_divisor and not is_padded
    scale: Any = norm.weight
    increases = scale is None or bool((scale >= 0).all())
    return type(pool) in _MAX_POOLS and increases and not pool.return_indices


def _numbers(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _fold(convolution: Any, norm: Any) -> None:
    """Give the convolution the weight and bias of both."""
    weight, bias = fuse_conv_bn_weights(
        convolution.weight.double(),
        None if convolution.bias is None else convolution.bias.double(),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        None if norm.weight is None else norm.weight.double(),
        None if norm.bias is None else norm.bias.double(),
    )
    # rounded once, from float64
    dtype, needs_grad = convolution.weight.dtype, convolution.weight.requires_grad
    with torch.no_grad():
        convolution.weight.copy_(weight)
    convolution.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=needs_grad)
