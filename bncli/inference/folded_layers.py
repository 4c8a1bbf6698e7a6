"""What folding does to the two layers: the weights of the one that stays, and what is left of the other.

In eval mode BatchNorm is `scale * x + shift` per channel, with `scale = weight / sqrt(running_var + eps)` and
`shift = bias - running_mean * scale`. All is computed in float64 on the CPU and rounded once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from bncli.errors import BncliError

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
