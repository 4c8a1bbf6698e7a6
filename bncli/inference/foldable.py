"""Whether one layer can take in a BatchNorm layer that is next to it: what is wrong with a pair, in words."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bncli.inference.folded_layers import FoldedAway
from bncli.inference.own_forward import ends_in_product
from bncli.inference.stand_in import has_hooks

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
