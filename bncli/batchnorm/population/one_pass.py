"""One pass over all batches: the moments of chosen layers, batch by batch."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batches import Batches, SameImages, inputs_of
from bncli.batchnorm.distance import rms
from bncli.batchnorm.population.hooks import recording
from bncli.batchnorm.population.merge_tree import BatchTree
from bncli.errors import DataError

MIN_BATCHES = 8  # before a standard error from so few clusters is trusted to end a pass

# (pass from 1, passes in all as far as known, images done in this pass)
PassProgress = Callable[[int, int, int], None]


@dataclass(frozen=True, eq=False)
class MeasuredPass:
    """What one pass saw. A layer that saw no input has no tree."""

    trees: dict[str, BatchTree]
    num_images: int
    num_batches: int
    stopped_early: bool  # because every standard error was below the tolerance


def measure_pass(
    model: nn.Module,
    batches: Batches,
    layers: Mapping[str, _BatchNorm],
    *,
    by_batch: Collection[str] = (),
    until: Mapping[str, int] | None = None,
    num_batches: int | None = None,
    tolerance: float | None = None,
    first_batch: int = 0,
    same_images: SameImages | None = None,
    forward: Callable[[Tensor], object] | None = None,
    progress: Callable[[int], None] | None = None,
) -> MeasuredPass:
    """Run the model over the batches as `recording` does, and keep the moments of every layer.

    `num_batches` limits the pass; `first_batch` is the index of the first one in the whole data set.

    Raises DataError without images.
    """
    trees: dict[str, BatchTree] = {}
    num_images = count = 0
    stopped = False
    with recording(model, layers, by_batch=by_batch, until=until, forward=forward) as record:
        for inputs in inputs_of(batches, num_batches):
            for name, moments in record(inputs).items():
                trees.setdefault(name, BatchTree()).add(first_batch + count, moments)
            count += 1
            num_images += len(inputs)
            if same_images is not None:
                same_images.see(inputs)
            if progress is not None:
                progress(num_images)
            # asked ever more rarely, so that its cost stays small
            due = count >= MIN_BATCHES and count % max(1, count // MIN_BATCHES) == 0
            if tolerance is not None and due and _worst_error(trees, layers) <= tolerance:
                stopped = True
                break
    if num_images == 0:
        raise DataError("there is nothing to measure: the batches hold no images")
    if same_images is not None:
        same_images.end_pass()
    return MeasuredPass(trees, num_images, count, stopped)


def _worst_error(trees: Mapping[str, BatchTree], layers: Mapping[str, _BatchNorm]) -> float:
    """The largest standard error of a layer's mean: RMS over channels, in deviations."""
    errors = []
    for name, tree in trees.items():
        deviations = (tree.total().variance() + layers[name].eps).sqrt()
        errors.append(rms(tree.standard_errors()[0] / deviations))
    return float(torch.tensor(errors).max()) if errors else float("inf")
