"""For training loops that are not ours: measure population statistics before each validation.

In train mode BatchNorm does not use its running statistics, so writing them before a validation changes no
weight and no later step. The validation then measures the weights, not the lag of an average. A checkpoint
that is saved after it holds the statistics that were validated.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bncli.batches import Batches, GetTensor, inputs_of
from bncli.batchnorm import Recalibration, recalibrate
from bncli.batchnorm.population.selection import Layers
from bncli.distributed.ranks import Ranks
from bncli.distributed.shards import without_repeats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# for the statistics of a whole network they are enough: see .readme/measurements.md, "Averaged weights"
NUM_IMAGES = 2_000


def recalibrate_before_validation(
    model: nn.Module,
    batches: Batches,
    *,
    num_images: int = NUM_IMAGES,
    layers: Layers = None,
    group: "ProcessGroup | None" = None,
    get_input: GetTensor | None = None,
) -> Recalibration:
    """Change the model: write population statistics of training images into its BatchNorm layers, in place.

    Takes the first batches until `num_images` images were seen, in one pass (`precise`), with dropout off.
    Every module keeps its mode. The random numbers that training draws later stay the same: the states of
    torch (CPU), of Python and of numpy are put back, and those of a DataLoader's own generators. A DataLoader
    with persistent workers that training is in the midst of cannot be read a second time: give another one.
    `layers` and `get_input` are those of `recalibrate`. `to_log` of the result has numbers for a log.

    With a process `group` every rank calls it with its own part of the images, reads an equal share of
    `num_images` of them, and gets the statistics of all: see `recalibrate`.

    Raises DataError for batches that cannot be used, and BncliError if no layer can be recalibrated or one
    sees values that are not finite; the model is as it was then.
    """
    own = -(-num_images // Ranks.of(group).size)
    with _random_numbers_kept(batches):
        return recalibrate(
            model,
            _first(without_repeats(batches, get_input), own),
            method="precise",
            layers=layers,
            group=group,
        )


def _first(batches: Batches, num_images: int) -> Iterator[Tensor]:
    """Inputs (n, ...), whole batches, until there are `num_images`."""
    missing = num_images
    for inputs in inputs_of(batches):
        yield inputs
        missing -= len(inputs)
        if missing <= 0:
            return


@contextmanager
def _random_numbers_kept(batches: Batches) -> Iterator[None]:
    """Put every state back that reading a DataLoader may move."""
    generators: list[torch.Generator] = []
    if isinstance(batches, DataLoader):
        owners = (batches, batches.sampler, batches.batch_sampler)
        found = (getattr(owner, "generator", None) for owner in owners)
        generators = [one for one in found if isinstance(one, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
