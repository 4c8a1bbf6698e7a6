"""How far running statistics are from what a layer really sees, and whether they are a fixed point.

In eval mode every layer normalises by its running statistics. They are self-consistent if what enters the
layer then has just that mean and (biased) variance: the check for `recalibrate`, and for any checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batches import Batches, GetTensor
from bncli.batchnorm.distance import Distance, measure_distance
from bncli.batchnorm.population.moments import Moments
from bncli.batchnorm.population.one_pass import Share, measure_pass
from bncli.batchnorm.population.selection import Layers, select_layers
from bncli.distributed.ranks import Ranks
from bncli.distributed.shards import without_repeats
from bncli.distributed.wrapped import as_written, whole_parameters

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class LayerConsistency:
    """One layer's running statistics against its real input in eval mode."""

    name: str
    mean_shift_in_input_deviations: float  # running_mean from the input's mean, RMS over channels
    var_ratio: float  # running_var to the input's variance, geometric mean over channels
    max_relative_error: float  # see `max_relative_error`
    num_values: int  # per channel

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.name}: running_mean is off by {self.mean_shift_in_input_deviations:.2g} of its input's"
            f" deviations, running_var is {self.var_ratio:.4g} times its variance; no channel is off by more"
            f" than {self.max_relative_error:.1e}"
        )


def verify_fixed_point(
    model: nn.Module,
    batches: Batches,
    layers: Layers = None,
    *,
    first_batch: int | None = None,
    group: "ProcessGroup | None" = None,
    get_input: GetTensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[LayerConsistency, ...]:
    """Compare every layer's running statistics with what enters it in eval mode, in one pass.

    The model is left as it was. Layers that see no input are missing; those of `select_layers` that are
    left alone are too. `progress` is told the images done. `group` and `first_batch` are those of
    `measure_population`.

    Raises DataError without images, BncliError if no layer can be measured.
    """
    model, ranks = as_written(model), Ranks.of(group)
    with ranks.together(), whole_parameters(model):
        chosen = select_layers(model, layers).layers
        share = Share.of(ranks, first_batch)
        batches = without_repeats(batches, get_input)
        trees = measure_pass(model, batches, chosen, share=share, progress=progress).trees
    found = []
    for name, layer in chosen.items():
        if name in trees:
            seen = trees[name].total()
            distance = distance_from(layer, seen)
            found.append(
                LayerConsistency(
                    name,
                    distance.rms_mean_shift,
                    distance.mean_var_ratio,
                    max_relative_error(layer, seen),
                    seen.count,
                )
            )
    return tuple(found)


def distance_from(layer: _BatchNorm, seen: Moments) -> Distance:
    """How far the layer's running statistics are from those values' mean and biased variance."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    running = layer.running_mean, layer.running_var
    return measure_distance(running, (seen.mean, seen.variance()), eps=layer.eps)


def max_relative_error(layer: _BatchNorm, seen: Moments) -> float:
    """The largest over channels and both statistics; NaN if any is.

    Of the mean it is relative to the mean or the deviation, whichever is larger: a mean of 0 has no
    relative error, and a buffer cannot hold a mean better than its own rounding. Of the variance it is
    relative to variance + eps, what is divided by.
    """
    assert layer.running_var is not None
    found = distance_from(layer, seen)
    scale = torch.maximum(seen.mean.abs(), found.reference_spread.sqrt())
    # without eps, in which a small variance would lose digits
    var_errors = (layer.running_var.detach().cpu().double() - seen.variance()).abs() / found.reference_spread
    return float(torch.cat([found.mean_difference.abs() / scale, var_errors]).max())
