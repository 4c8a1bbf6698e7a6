"""BatchNorm layers and their running statistics, read from a model or a state dict.

Reading copies: nothing that is done to a result can reach the model, and the model can train on without
changing a result.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bncli.batchnorm.conventions import PYTORCH, Convention
from bncli.batchnorm.state_dict import batch_norm_keys, batch_norm_names

AVERAGED_KEY = "n_averaged"  # how many weights torch.optim.swa_utils.AveragedModel has averaged


@dataclass(frozen=True)
class Hyperparameters:
    """What a BatchNorm module knows beside its tensors; a whole pickled module has them, a state dict not."""

    num_features: int
    eps: float | None
    momentum: float | None  # weight of the new batch; None: cumulative average
    was_measured: bool = False  # whether its statistics were replaced by what was measured, as in LayerStats
    averaged_by_training: bool = False  # as in LayerStats
    is_frozen: bool = False  # as in LayerStats; then there is no momentum to know
    momentum_known: bool = True  # False of a file that has the layer's framework, and not its momentum
    convention: Convention = PYTORCH


@dataclass(frozen=True, eq=False)
class LayerStats:
    """One BatchNorm layer: its running statistics, affine parameters and hyperparameters.

    Tensors are CPU copies of shape (C,) in the layer's own dtype; None where the layer has none
    (`track_running_stats=False`, `affine=False`). `running_var` is what eval mode computes with; whether it
    averages unbiased batch variances, as PyTorch's does, is in `convention`. So is what the framework calls
    its momentum: here it is PyTorch's, the weight of the new batch.
    """

    name: str
    num_features: int
    num_batches_tracked: int | None  # rounded down where the counter is not a whole number
    counter_dtype: torch.dtype | None  # of num_batches_tracked: torch.int64 in every model PyTorch makes
    momentum: float | None  # weight of the new batch; None with hyperparameters_known: cumulative
    eps: float | None
    hyperparameters_known: (
        bool  # False from a state dict, which stores neither momentum nor eps, and if is_frozen
    )
    running_mean: Tensor | None  # (C,)
    running_var: Tensor | None  # (C,)
    weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    # True where something tells that the statistics were measured since: then they are no average of what
    # num_batches_tracked counts
    was_measured: bool = False
    # True where something tells that training alone made them: an average from (0, 1), by `momentum`
    averaged_by_training: bool = False
    is_frozen: bool = False  # True for a class that never updates its statistics, such as FrozenBatchNorm2d
    weights_were_averaged: bool = (
        False  # True beside `n_averaged`, as torch.optim.swa_utils.AveragedModel keeps
    )
    convention: Convention = PYTORCH  # of the framework that the file is from

    @property
    def eps_or_default(self) -> float:
        """Its eps; where the file has none, the default of its framework."""
        return self.convention.default_eps if self.eps is None else self.eps

    @property
    def framework_momentum(self) -> float | None:
        """Its momentum as its framework writes it; None where it is unknown, or cumulative."""
        known = self.momentum if self.hyperparameters_known else None
        return None if known is None else self.convention.translate_momentum(known)

    @property
    def is_tracked(self) -> bool:
        """Whether it has running statistics; else it normalises by the batch's own."""
        return self.running_mean is not None and self.running_var is not None

    def __repr__(self) -> str:
        """One line: which layer, how many updates, and between what its statistics lie."""
        parts = [f"{self.num_features} channels"]
        if self.num_batches_tracked is not None:
            parts.append(f"{self.num_batches_tracked} batches tracked")
        for name in ("running_mean", "running_var"):
            values = getattr(self, name)
            if values is None:
                parts.append(f"no {name}")
            elif values.numel():
                wide = values.double()
                parts.append(f"{name} {float(wide.min()):.3g} to {float(wide.max()):.3g}")
        return f"LayerStats({self.name!r}: {', '.join(parts)})"


def batch_norm_layers(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Every BatchNorm1d/2d/3d and SyncBatchNorm with its name, in model order.

    A module that is reachable under two names is listed once, under the first.
    """
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def read_running_stats(
    model_or_state_dict: nn.Module | Mapping[str, object],
    hyperparameters: Mapping[str, Hyperparameters] | None = None,
) -> tuple[LayerStats, ...]:
    """Read all BatchNorm layers, in model order, without changing anything.

    In a state dict a layer is recognised by `running_mean` and `running_var` of one shape (C,) under one
    prefix. Three things look alike there: InstanceNorm with `track_running_stats=True` and frozen
    BatchNorm variants have the same keys, so they are listed; a layer without running statistics leaves
    no trace, so it is not; and a module shared under two names is listed under both. `hyperparameters`
    tells, by layer name, what a state dict cannot; a layer that is only named there comes last, without
    running statistics.

    Raises TypeError for anything but a module or a mapping.
    """
    if isinstance(model_or_state_dict, nn.Module):
        averaged = AVERAGED_KEY in dict(model_or_state_dict.named_buffers(recurse=False))
        layers = batch_norm_layers(model_or_state_dict)
        return tuple(_read_module(name, module, averaged=averaged) for name, module in layers)
    if isinstance(model_or_state_dict, Mapping):
        return _read_state_dict(model_or_state_dict, hyperparameters or {})
    kind = type(model_or_state_dict).__name__
    raise TypeError(f"expected an nn.Module or a state dict (Mapping[str, Tensor]), got {kind}")


def float64_statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """running_mean and running_var (C,) of a layer that keeps them: float64 copies on the CPU."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, var = (
        buffer.detach().to("cpu", torch.float64, copy=True)
        for buffer in (layer.running_mean, layer.running_var)
    )
    return mean, var


def write_statistics(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Change the layer: write mean and variance (C,) into its buffers, in place and in their own types."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    with torch.no_grad():
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)


def _read_module(name: str, module: _BatchNorm, *, averaged: bool) -> LayerStats:
    return LayerStats(
        name=name,
        num_features=module.num_features,
        num_batches_tracked=_count(module.num_batches_tracked),
        counter_dtype=_dtype(module.num_batches_tracked),
        momentum=module.momentum,
        eps=module.eps,
        hyperparameters_known=True,
        running_mean=_copy(module.running_mean),
        running_var=_copy(module.running_var),
        weight=_copy(module.weight),
        bias=_copy(module.bias),
        weights_were_averaged=averaged,
    )


def _read_state_dict(
    state: Mapping[str, object], hyperparameters: Mapping[str, Hyperparameters]
) -> tuple[LayerStats, ...]:
    names = batch_norm_names(state)
    # a layer that is only named there has no running statistics
    names += [name for name in hyperparameters if name not in set(names)]
    return tuple(_read_entries(state, name, hyperparameters.get(name)) for name in names)


def _read_entries(state: Mapping[str, object], name: str, known: Hyperparameters | None) -> LayerStats:
    keys = batch_norm_keys(state, name, known.num_features if known else None)
    entries = {leaf: state[key] for leaf, key in keys.items()}
    mean, counter = _copy(entries.get("running_mean")), entries.get("num_batches_tracked")
    return LayerStats(
        name=name,
        num_features=len(mean) if mean is not None else known.num_features if known else 0,
        num_batches_tracked=_count(counter),
        counter_dtype=_dtype(counter),
        momentum=known.momentum if known else None,
        eps=known.eps if known else None,
        hyperparameters_known=known is not None and not known.is_frozen and known.momentum_known,
        was_measured=known is not None and known.was_measured,
        averaged_by_training=known is not None and known.averaged_by_training,
        is_frozen=known is not None and known.is_frozen,
        weights_were_averaged=AVERAGED_KEY in state,
        convention=known.convention if known else PYTORCH,
        running_mean=mean,
        running_var=_copy(entries.get("running_var")),
        weight=_copy(entries.get("weight")),
        bias=_copy(entries.get("bias")),
    )


def _copy(value: object) -> Tensor | None:
    """A CPU copy; None for a missing tensor and for one that a lazy layer has not made yet."""
    if not isinstance(value, Tensor) or is_lazy(value):
        return None
    # a tensor that is already on the CPU would otherwise be handed out itself
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _count(value: object) -> int | None:
    """The counter's value; None for a missing one and for one that is no finite number."""
    if not isinstance(value, Tensor) or is_lazy(value) or value.numel() != 1:
        return None
    number = value.item()
    return int(number) if isfinite(number) else None


def _dtype(value: object) -> torch.dtype | None:
    return None if not isinstance(value, Tensor) or is_lazy(value) else value.dtype


def has_running_statistics(model: nn.Module) -> bool:
    """Whether any BatchNorm layer of the model keeps them."""
    return any(layer.running_mean is not None for _, layer in batch_norm_layers(model))


@dataclass(frozen=True)
class Summary:
    """Smallest, middle and largest value, in the tensor's unit. One NaN makes all three NaN."""

    min: float
    median: float
    max: float


def summarize(tensor: Tensor | None) -> Summary | None:
    """Summarise every value of a tensor of any shape, in float64; None for no tensor or no values.

    Nothing is left out: infinities count as the values they are, and a NaN, which has no place in an
    order, turns the whole summary into NaN. The median of an even number of values is the mean of the
    two in the middle.
    """
    if tensor is None or tensor.numel() == 0:
        return None
    # tens of thousands of small tensors: NumPy sorts them several times faster than PyTorch, NaN last as well
    values = np.sort(tensor.detach().cpu().double().flatten().numpy())
    if math.isnan(values[-1]):
        return Summary(math.nan, math.nan, math.nan)
    low, high = float(values[(len(values) - 1) // 2]), float(values[len(values) // 2])
    median = low / 2 + high / 2  # low + high might overflow
    return Summary(float(values[0]), median, float(values[-1]))
