"""How far running statistics are from what a layer really sees, and whether they are a fixed point.

In eval mode every layer normalises by its running statistics. They are self-consistent if what enters the
layer then has just that mean and (biased) variance: the check for `recalibrate`, and for any checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batches import Batches, GetTensor, read_with
from bncli.batchnorm.population.measured_pass import measure_pass, rms
from bncli.batchnorm.population.moments import Moments
from bncli.batchnorm.population.selection import Layers, select_layers


@dataclass(frozen=True)
class LayerConsistency:
    """One layer's running statistics against its real input in eval mode."""

    name: str
    mean_shift: float  # of running_mean, in deviations of the input, RMS over channels
    var_ratio: float  # running_var to the input's variance, geometric mean over channels
    max_relative_error: float  # see `max_relative_error`
    num_values: int  # per channel


def verify_fixed_point(
    model: nn.Module,
    batches: Batches,
    layers: Layers = None,
    *,
    get_input: GetTensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[LayerConsistency, ...]:
    """Compare every layer's running statistics with what enters it in eval mode, in one pass.

    The model is left as it was. Layers that see no input are missing; those of `select_layers` that are
    left alone are too. `progress` is told the images done.

    Raises DataError without images, BncliError if no layer can be measured.
    """
    chosen = select_layers(model, layers).layers
    trees = measure_pass(model, read_with(batches, get_input), chosen, progress=progress).trees
    found = []
    for name, layer in chosen.items():
        if name in trees:
            seen = trees[name].total()
            found.append(
                LayerConsistency(
                    name,
                    mean_shift(layer, seen),
                    var_ratio(layer, seen),
                    max_relative_error(layer, seen),
                    seen.count,
                )
            )
    return tuple(found)


def mean_shift(layer: _BatchNorm, seen: Moments) -> float:
    """How far running_mean is from the mean: RMS over channels, in deviations sqrt(variance + eps)."""
    return rms((_wide(layer.running_mean) - seen.mean) / (seen.variance() + layer.eps).sqrt())


def var_ratio(layer: _BatchNorm, seen: Moments) -> float:
    """running_var to variance, eps added to both: geometric mean over channels. NaN if one is negative."""
    ratios = (_wide(layer.running_var) + layer.eps) / (seen.variance() + layer.eps)
    return float(ratios.log().mean().exp())


def max_relative_error(layer: _BatchNorm, seen: Moments) -> float:
    """The largest over channels and both statistics; NaN if any is.

    Of the mean it is relative to the mean or the deviation, whichever is larger: a mean of 0 has no
    relative error, and a buffer cannot hold a mean better than its own rounding. Of the variance it is
    relative to variance + eps, what is divided by.
    """
    spread = seen.variance() + layer.eps
    mean_errors = (_wide(layer.running_mean) - seen.mean).abs() / torch.maximum(
        seen.mean.abs(), spread.sqrt()
    )
    var_errors = (_wide(layer.running_var) - seen.variance()).abs() / spread
    return float(torch.cat([mean_errors, var_errors]).max())


def _wide(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer.detach().to("cpu", torch.float64)
