"""Replace running statistics by population statistics: the one function here that changes a model.

The method debias removes the start (0, 1) of an exponential average without any data. After t batches an
average with momentum m holds the fraction r = (1 - m)**t of what it started with, and 1 - r of the batches:
running = r * start + (1 - r) * batches. So batches = (running - r * start) / (1 - r), the bias correction
of Adam (Kingma & Ba 2015). It holds if momentum was the same for all batches and the start was PyTorch's;
neither can be seen in a checkpoint, except where a variance turns out negative.
"""

from dataclasses import dataclass
from math import hypot, inf, isfinite, isnan, log
from typing import TYPE_CHECKING, Literal

from torch import Tensor, float64, nn, tensor
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batches import Batches, GetTensor
from bncli.batchnorm.layers import batch_norm_layers, float64_statistics, write_statistics
from bncli.batchnorm.population.measure import Population, measure_population
from bncli.batchnorm.population.moments import Moments
from bncli.batchnorm.population.one_pass import PassProgress
from bncli.batchnorm.population.selection import Layers, SkippedLayer, select_layers
from bncli.batchnorm.population.verify import distance_from
from bncli.distributed.wrapped import as_written
from bncli.errors import BncliError
from bncli.wording import plural

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def without_start(layer: _BatchNorm) -> tuple[Tensor, Tensor] | str:
    """What running_mean and running_var (C,) would hold without their start, float64; or why not."""
    if layer.momentum is None:
        return "has momentum None: a cumulative average holds nothing of its start"
    if layer.num_batches_tracked is None:
        return "does not know how many batches it tracked"
    num_batches = float(layer.num_batches_tracked)
    if not isfinite(num_batches) or num_batches < 0 or not 0 <= layer.momentum <= 1:
        return f"has momentum {layer.momentum:g} and tracked {num_batches:g} batches, which cannot be"
    rest = (1 - layer.momentum) ** num_batches
    if rest == 1:
        return f"holds nothing but its start: {num_batches:g} batches with momentum {layer.momentum:g}"
    mean, var = float64_statistics(layer)
    mean, var = mean / (1 - rest), (var - rest) / (1 - rest)
    if not bool((var >= 0).all()):
        return "did not start at variance 1, or momentum was not constant: a variance would be negative"
    return mean, var


@dataclass(frozen=True)
class LayerChange:
    """How far one layer moved. The new deviations are sqrt(new variance + eps)."""

    name: str
    mean_shift_in_new_deviations: float  # old running_mean from the new one, RMS over channels
    var_ratio: float  # old running_var to the new one, eps added to both, geometric mean; NaN if negative
    standard_error: float | None  # of the new mean, in new deviations, RMS over channels; None if unknown
    var_standard_error: float | None  # of the new variance, relative, RMS over channels; None if unknown
    num_values: int | None  # that the new statistics were measured on, per channel; None: no data


@dataclass(frozen=True)
class Recalibration:
    """What `recalibrate` did. Layers are in model order."""

    method: str
    num_images: int  # 0: no data was needed
    num_batches: int
    stopped_early: bool  # because every standard error was below the tolerance
    num_passes: int
    forward_passes: float  # what it cost: 1.0 is one forward pass over all the images, counted in FLOPs
    layers: tuple[LayerChange, ...]
    skipped: tuple[SkippedLayer, ...]  # asked for and left alone, with the reason

    def __str__(self) -> str:
        """How many layers, on how many images, and which moved furthest."""
        furthest = max(self.layers, key=_how_far)
        measured = f", measured on {plural(self.num_images, 'image')}" if self.num_images else ""
        left_alone = f", {len(self.skipped)} left alone" if self.skipped else ""
        return (
            f"{plural(len(self.layers), 'BatchNorm layer')} recalibrated ({self.method})"
            f"{measured}{left_alone}\n"
            f"furthest off was {furthest.name}: running_mean by"
            f" {furthest.mean_shift_in_new_deviations:.2g} deviations, running_var by a factor of"
            f" {furthest.var_ratio:.2g}"
        )

    def to_log(self, prefix: str = "batch_norm/") -> dict[str, float]:
        """How far the old statistics were off, for a log: over layers, the worst of each.

        `mean_shift` is in standard deviations of the new statistics (0: none), `var_ratio_min` and
        `var_ratio_max` are the old variance to the new one (1: none).
        """
        # by torch, whose min and max keep a NaN
        shifts = tensor([layer.mean_shift_in_new_deviations for layer in self.layers], dtype=float64)
        ratios = tensor([layer.var_ratio for layer in self.layers], dtype=float64)
        return {
            f"{prefix}mean_shift": float(shifts.max()),
            f"{prefix}var_ratio_min": float(ratios.min()),
            f"{prefix}var_ratio_max": float(ratios.max()),
        }


def _how_far(layer: LayerChange) -> float:
    """Both distances in one, as in `LayerGap.self_consistency`; what is no number is farthest."""
    if isnan(layer.var_ratio) or isnan(layer.mean_shift_in_new_deviations) or layer.var_ratio <= 0:
        return inf
    return hypot(layer.mean_shift_in_new_deviations, log(layer.var_ratio))


def recalibrate(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    method: Literal["exact", "precise", "debias"] = "exact",
    layers: Layers = None,
    tolerance: float | None = None,
    first_batch: int | None = None,
    group: "ProcessGroup | None" = None,
    get_input: GetTensor | None = None,
    progress: PassProgress | None = None,
) -> Recalibration:
    """Change the model: write population statistics into running_mean and running_var, in place.

    Only those two buffers of the chosen layers change, by `copy_`, and only after everything was measured:
    an error or Ctrl-C leaves the model as it was. num_batches_tracked and momentum stay, since no batch
    was tracked. The variance written is the biased one (`bncli.batchnorm.population.measure` says why).

    In a training loop of several processes, on each of them, before rank 0 saves:

        group = torch.distributed.group.WORLD
        loader = DataLoader(images, batch_sampler=DealtBatches(images, 256, group))
        recalibrate(model, loader, group=group)

    `exact` and `precise` take the arguments of `measure_population`; with a process `group` every rank calls
    this with its own part of the data, and all write the same bits. `debias` takes no batches: it removes
    the start (0, 1) from an exponential average of few steps (`bncli.batchnorm.population.recalibrate`).

    Raises DataError for batches that cannot be used, and BncliError if no layer can be recalibrated or
    one sees values that are not finite.
    """
    if method == "debias":
        return _debias(model, layers)
    if batches is None:
        raise BncliError(f"the method {method} needs batches to measure")
    population = measure_population(
        model,
        batches,
        method=method,
        layers=layers,
        tolerance=tolerance,
        first_batch=first_batch,
        group=group,
        get_input=get_input,
        progress=progress,
    )
    return apply_population(model, population)


def apply_population(model: nn.Module, population: Population) -> Recalibration:
    """Change the model: write what `measure_population` found for it into its buffers.

    Raises BncliError if a layer is missing or a value is not finite in its buffer; nothing is written then.
    """
    modules = dict(batch_norm_layers(as_written(model)))
    writes: list[tuple[_BatchNorm, Tensor, Tensor]] = []
    changes = []
    for one in population.layers:
        layer, seen = modules.get(one.name), one.moments
        if layer is None or layer.num_features != len(seen.mean):
            raise BncliError(f"this population is of another model: no layer {one.name} of its size here")
        writes.append((layer, *_as_stored(one.name, layer, seen.mean, seen.variance())))
        moved = distance_from(layer, seen)
        changes.append(
            LayerChange(
                one.name,
                moved.rms_mean_shift,
                moved.mean_var_ratio,
                _known(one.standard_error()),
                _known(one.variance_standard_error()),
                seen.count,
            )
        )
    for write in writes:
        write_statistics(*write)
    return Recalibration(
        population.method,
        population.num_images,
        population.num_batches,
        population.stopped_early,
        population.num_passes,
        population.forward_passes,
        tuple(changes),
        population.skipped,
    )


def _debias(model: nn.Module, layers: Layers) -> Recalibration:
    selection = select_layers(as_written(model), layers)
    writes: list[tuple[_BatchNorm, Tensor, Tensor]] = []
    changes, skipped = [], list(selection.skipped)
    for name, layer in selection.layers.items():
        result = without_start(layer)
        if isinstance(result, str):
            skipped.append(SkippedLayer(name, result))
            continue
        mean, var = result
        moved = distance_from(layer, Moments(1, mean, var))
        writes.append((layer, *_as_stored(name, layer, mean, var)))
        changes.append(LayerChange(name, moved.rms_mean_shift, moved.mean_var_ratio, None, None, None))
    if not changes:
        reasons = "; ".join(f"{one.name} {one.reason}" for one in skipped)
        raise BncliError(f"in no layer can the share of the initial values be taken out: {reasons}")
    for write in writes:
        write_statistics(*write)
    return Recalibration("debias", 0, 0, False, 0, 0.0, tuple(changes), tuple(skipped))


def _as_stored(name: str, layer: _BatchNorm, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the buffers' types. Raises BncliError if one is not finite there."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    stored = (mean.to(layer.running_mean.dtype), var.to(layer.running_var.dtype))
    if not all(bool(one.isfinite().all()) for one in stored):
        raise BncliError(
            f"{name} sees values that are not finite, or too large for its {layer.running_var.dtype} buffers:"
            " nothing was changed"
        )
    return stored


def _known(value: float) -> float | None:
    return None if isnan(value) else value
