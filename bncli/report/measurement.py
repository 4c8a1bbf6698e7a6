"""What a report computes with a network and its images: accuracy by batch size, the gap, a layer's input."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bncli.batches import Batches
from bncli.batchnorm import batch_norm_layers
from bncli.errors import DataError
from bncli.evaluation import (
    Gap,
    RecordedChannel,
    SweepPoint,
    measure_gap,
    record_channel,
    sweep_batch_sizes,
)
from bncli.evaluation.gap import PhaseProgress
from bncli.indexed import Indexed, InMemory
from bncli.sample import stratified_sample

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Measurement:
    """What was measured, and on how many images."""

    dataset: str
    num_images: int  # of the test split
    sweep: tuple[SweepPoint, ...]
    gap: Gap
    channel: RecordedChannel  # of the layer that is most to blame, or of the first


def measure(
    model: nn.Module,
    test: Indexed,
    training: Batches,
    *,
    dataset: str,
    num_images: int,
    batch_size: int = 256,
    place: Callable[[Tensor], Tensor] = lambda images: images,
    progress: PhaseProgress = lambda phase, done, total: None,
) -> Measurement:
    """Measure a classifier on `num_images` of the labelled test images; it is left as it was.

    `training` are unaugmented training images, the same each time. `place` brings test images to where and
    how the model computes. For another precision call this inside `torch.autocast`.

    Raises DataError without labels, BncliError for a model that is no classifier or has no running
    statistics.
    """
    labels = test.labels
    if labels is None:
        raise DataError(f"{dataset}: the images have no labels, so accuracy cannot be measured")
    chosen = stratified_sample(labels, min(num_images, len(test)))
    # in a random order: batches that are sorted by class would not look like those of training
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    ((images, truth),) = test.batches_of([chosen])
    sample = InMemory(images, truth)
    size = min(max(2, batch_size), len(sample))
    whole = len(sample) - (1 if len(sample) % size == 1 else 0)  # one image may have no variance

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(whole).split(size)
        return ((place(part), labels) for part, labels in sample.batches_of(order))

    gap = measure_gap(model, batches, training, progress=progress)
    sweep = sweep_batch_sizes(
        model,
        sample,
        [one for one in BATCH_SIZES if one <= len(sample)],
        place=place,
        progress=lambda done, total: progress("passes over the test images, in both modes", done, total),
    )
    layer = gap.worst_layer or next(
        name for name, module in batch_norm_layers(model) if module.running_mean is not None
    )
    channel = record_channel(model, training, layer)
    return Measurement(dataset, len(sample), sweep, gap, channel)
