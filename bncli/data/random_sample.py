"""Images of a split in one random order, unaugmented: what population statistics are measured on.

Folders come sorted by class, so the first images are no sample and batches of neighbours look like no
training batch. The order is a function of the number of images alone: the first n images of it are the
same in every command, and a shorter sample is the beginning of a longer one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bncli.data.dataset import Split
from bncli.data.epoch_batches import BatchPlan
from bncli.data.randomness import Stream, generator


def sample_batches(split: Split, batch_size: int, num_images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first `num_images` of the order: images (B, 3, H, W) uint8 and labels (B,).

    The last batch may be smaller; a single image left over joins the batch before, since BatchNorm may
    not be able to measure it alone. Indexes lazily, so that a mapped data set stays on the disk.

    Of fewer images than asked for, all are taken. Raises ConfigError for fewer than one batch needs.
    """
    num_images = min(num_images, len(split))
    plan = BatchPlan(num_images, min(batch_size, num_images), "keep", min_batch=min(2, batch_size))
    order = torch.from_numpy(generator(Stream.SAMPLE, len(split)).permutation(len(split)))
    for indices in order[:num_images].split(list(plan.batch_sizes)):
        where = indices.to(split.images.device)
        yield split.images[where], split.labels[where]
