"""What folding does to the two layers: the weights of the one that stays, and what is left of the other.

In eval mode BatchNorm is `scale * x + shift` per channel, with `scale = weight / sqrt(running_var + eps)` and
`shift = bias - running_mean * scale`. All is computed in float64 on the CPU and rounded once.

Whether a pair can be folded at all is decided here too, with what is wrong with it in words.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from bncli.errors import BncliError
from bncli.inference.stand_in import ends_in_product, has_hooks

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DIMENSIONS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}
# A layer that takes in the BatchNorm ahead of it subtracts the mean after the product instead of before. That
# costs as many bits as the mean is larger than the deviation: two at most.
_MAX_MEAN = 4.0  # deviations
_COMPUTES = {"forward", "_conv_forward"}  # the methods that say what a layer computes


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether this is BatchNorm and nothing else, so not what a subclass adds."""
    return _is_plain(norm, (nn.SyncBatchNorm, _BatchNorm))


def problem_of_norm(norm: Any) -> str | None:
    """What keeps a BatchNorm layer from being folded, whatever is next to it."""
    if norm.running_mean is None or norm.running_var is None:
        return "has no running statistics, so eval mode takes those of the batch"
    if norm.training:
        return "stays in train mode"
    return _problem_of_tensors(norm, ("weight", "bias", "running_mean", "running_var"))


def problem_of_pair(layer: Any, norm: Any, *, is_before: bool) -> str | None:
    """What keeps a convolution or linear layer from taking in BatchNorm behind it, or else ahead of it."""
    is_plain = _is_plain(layer, (*_CONVOLUTIONS, nn.Linear))
    if not is_plain and not (is_before and ends_in_product(layer)):
        return "computes in a way of its own"
    problem = _problem_of_tensors(layer, ("weight", "bias"))
    if problem is not None:
        return problem
    for kind, allowed in _DIMENSIONS.items():
        if isinstance(norm, kind) and layer.weight.dim() not in allowed:
            return "has another number of dimensions"
    is_linear = isinstance(layer, nn.Linear)
    if is_before:
        num_channels = layer.out_features if is_linear else layer.out_channels
    else:
        num_channels = layer.in_features if is_linear else layer.in_channels
    if len(norm.running_mean) != num_channels:
        return "has another number of channels"
    return None if is_before else _problem_of_layer_after(layer, norm)


def _problem_of_layer_after(layer: Any, norm: Any) -> str | None:
    if isinstance(layer, _ConvTransposeNd):
        return "is transposed, so the edges of its output get less of what BatchNorm adds"
    if isinstance(layer, _ConvNd) and _pads_with_zeros(layer):
        return "pads with zeros, which BatchNorm does not see"
    mean, var = norm.running_mean.double(), norm.running_var.double()
    if (mean.abs() > _MAX_MEAN * (var + norm.eps).sqrt()).any():
        return f"would lose digits, since a mean is more than {_MAX_MEAN:g} deviations"
    return None


def _pads_with_zeros(layer: _ConvNd) -> bool:
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    return any(size > 1 for size in layer.kernel_size) if layer.padding == "same" else any(layer.padding)


def is_passable(layer: nn.Module) -> bool:
    """Whether it may not matter on which side of this layer BatchNorm computes."""
    kinds = (nn.Identity, FoldedAway, *_DROPOUTS, *_MAX_POOLS, *_AVG_POOLS)
    return type(layer) in kinds and _is_plain(layer, kinds) and not layer.training and not has_hooks(layer)


def problem_of_passing(between: Any, layer: Any, norm: Any) -> str | None:
    """Why it does matter on which side of a passable layer BatchNorm computes. `layer` takes it in."""
    kind = type(between).__name__
    if type(between) not in (*_MAX_POOLS, *_AVG_POOLS):
        return None
    if int(kind[-2]) + 2 != layer.weight.dim():  # 1d, 2d or 3d
        return f"is cut off by {kind}, which pools over other axes"
    if type(between) in _AVG_POOLS:
        has_divisor = getattr(between, "divisor_override", None) is not None
        is_padded = between.count_include_pad and any(_numbers(between.padding))
        return f"is cut off by {kind}, whose weights do not sum to 1" if has_divisor or is_padded else None
    increases = norm.weight is None or bool((norm.weight >= 0).all())
    return None if increases else f"is cut off by {kind}, since BatchNorm has a negative weight"


def _numbers(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _problem_of_tensors(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    held: dict[str, Tensor | None] = {**layer._parameters, **layer._buffers}
    tensors = [tensor for name in names if (tensor := held.get(name)) is not None]
    if has_hooks(layer):
        return "has a hook"
    if any(name not in held for name in names):
        return "has a weight that is computed from others (a parametrization)"
    is_usual = [type(tensor) in {Tensor, nn.Parameter} and not tensor.is_meta for tensor in tensors]
    if not all(is_usual) or not all(tensor.is_floating_point() for tensor in tensors):
        return "holds no real numbers, or in a way of its own"
    return None


def _is_plain(layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether it computes what one of these classes does, and nothing else."""
    kind = type(layer)
    is_one = any(
        isinstance(layer, one) and all(getattr(kind, name, 0) is getattr(one, name, 0) for name in _COMPUTES)
        for one in kinds
    )
    return is_one and kind.__call__ is nn.Module.__call__ and not _COMPUTES & vars(layer).keys()


FoldableLayer = _ConvNd | nn.Linear


@dataclass(frozen=True, eq=False)
class EvalNorm:
    """What a BatchNorm layer computes in eval mode. Tensors (C,), float64."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, norm: _BatchNorm) -> "EvalNorm":
        """Read a layer that has running statistics."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        ones = torch.ones(len(norm.running_mean))
        weight = ones if norm.weight is None else norm.weight
        bias = ones * 0 if norm.bias is None else norm.bias
        return cls(_wide(norm.running_mean), _wide(norm.running_var), _wide(weight), _wide(bias), norm.eps)


def folded_behind(layer: FoldableLayer, norm: EvalNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that computes what `layer` and then BatchNorm do. In float64."""
    is_transposed = isinstance(layer, _ConvTransposeNd)
    # transposed, a weight is (in, out / groups, ...): channels of the output lie on the second axis, and only
    # within a group
    groups = layer.groups if isinstance(layer, _ConvTransposeNd) else 1
    bias = torch.zeros_like(norm.bias) if layer.bias is None else _wide(layer.bias)
    tensors = (_wide(layer.weight), bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    fused = [
        fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, scale, shift, transpose=is_transposed)
        for weight, bias, mean, var, scale, shift in zip(*(one.chunk(groups) for one in tensors), strict=True)
    ]
    weights, biases = zip(*fused, strict=True)
    return torch.cat(weights).detach(), torch.cat(biases).detach()


def folded_ahead(layer: FoldableLayer, norm: EvalNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that computes what BatchNorm and then `layer` do. In float64.

    The layer is no transposed convolution and pads with no zeros, which BatchNorm would not have seen.
    """
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    weight = _wide(layer.weight)  # (out, in / groups, ...)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # (in,)
    shift = norm.bias - norm.running_mean * scale
    grouped = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    scale, shift = (tensor.view(groups, 1, -1, 1) for tensor in (scale, shift))
    bias = (grouped * shift).sum((2, 3)).flatten()  # (out,)
    return (grouped * scale).reshape(weight.shape), bias if layer.bias is None else bias + _wide(layer.bias)


def set_weights(layer: FoldableLayer, weight: Tensor, bias: Tensor) -> None:
    """Give a layer new parameters in its own type, memory format and place; others may keep the old ones.

    Raises ValueError, and changes nothing, where they are no finite numbers in that type.
    """
    old = layer.weight
    with torch.no_grad():
        rounded = torch.empty_like(old).copy_(weight)
        rounded_bias = bias.to(old.device, old.dtype if layer.bias is None else layer.bias.dtype)
    if not (rounded.isfinite().all() and rounded_bias.isfinite().all()):
        raise ValueError(
            f"the folded weights are no finite numbers in {str(old.dtype).removeprefix('torch.')}"
        )
    needs_grad = old.requires_grad if layer.bias is None else layer.bias.requires_grad
    layer.weight = nn.Parameter(rounded, requires_grad=old.requires_grad)
    layer.bias = nn.Parameter(rounded_bias, requires_grad=needs_grad)


class FoldedAway(nn.Identity):
    """Stands where a BatchNorm layer was that reads its channels on the second axis, however many there are.

    The layer that took it in has them there for one number of dimensions only: a linear layer for (N, C).
    """

    num_dimensions: int  # of an input for which the two agree
    what: str  # was folded into which layer

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs as they are. Raises BncliError for another number of dimensions."""
        if inputs.dim() != self.num_dimensions:
            expected, shape = self.num_dimensions, tuple(inputs.shape)
            raise BncliError(
                f"{self.what}, which is right for inputs of {expected} dimensions, not for {shape}"
            )
        return inputs


def remove_norm(norm: Any, behind: dict[str, nn.Module], num_dimensions: int, what: str) -> None:
    """Make a BatchNorm layer one that leaves its input as it is, but for the modules behind.

    The object itself changes, so that whoever holds it beside its parent (a list of layers, say) has the new
    one as well.
    """
    is_ambiguous = not isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d)
    for held in (norm._parameters, norm._buffers, norm._modules):
        held.clear()
    guard: Any = nn.Identity().eval() if behind else norm
    guard.__class__ = FoldedAway if is_ambiguous else nn.Identity
    if is_ambiguous:
        guard.num_dimensions, guard.what = num_dimensions, what
    if behind:
        norm.__class__ = nn.Sequential
        norm._modules.update({"folded": guard, **behind} if is_ambiguous else behind)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()  # in this order: not every device has float64
