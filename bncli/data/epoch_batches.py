"""Batches: how an epoch is cut into steps, and which images each step sees.

The plan is made before the first step, so that the learning-rate schedule knows the number of steps and
BatchNorm never meets a batch too small for it. The order is a function of (seed, epoch) alone.

Images of a split in one random order, unaugmented: what population statistics are measured on.

Folders come sorted by class, so the first images are no sample and batches of neighbours look like no
training batch. The order is a function of the number of images alone: the first n images of it are the
same in every command, and a shorter sample is the beginning of a longer one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from bncli.config import AugmentConfig
from bncli.data.augment import augment, check_augmentation
from bncli.data.randomness import Stream, generator
from bncli.errors import ConfigError
from bncli.indexed import Indexed, in_order


@dataclass(frozen=True)
class BatchPlan:
    """The batch sizes of every epoch.

    With `last_batch="drop"` the images that fill no whole batch are left out, others in each epoch. With
    "keep" they make a smaller last batch, or join the batch before if they are fewer than `min_batch`:
    the smallest batch for which every BatchNorm layer sees more than one value per channel.

    Raises:
        ConfigError: no such plan exists; names the key, what was found and the fix.
    """

    num_images: int
    batch_size: int
    last_batch: Literal["drop", "keep"] = "drop"
    min_batch: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be cut into batches of at least `min_batch` images."""
        batches = f"train.batch_size: {self.batch_size} is"
        if self.batch_size < max(1, self.min_batch):
            reason = "BatchNorm would see one value per channel" if self.min_batch > 1 else "it is empty"
            problem = f"{batches} too small ({reason}); set it to at least {max(1, self.min_batch)}"
        elif self.num_images < max(1, self.min_batch):
            problem = f"{self.num_images} training images are too few for a batch of {self.min_batch}"
        elif self.last_batch == "drop" and self.num_images < self.batch_size:
            problem = (
                f"{batches} more than the {self.num_images} training images, so no whole batch exists; "
                f"set it to at most {self.num_images}, or set train.last_batch to keep"
            )
        else:
            return
        raise ConfigError("train", [problem])

    @cached_property
    def batch_sizes(self) -> tuple[int, ...]:
        """The number of images of each step of an epoch."""
        num_whole, rest = divmod(self.num_images, self.batch_size)
        if rest == 0 or self.last_batch == "drop":
            return (self.batch_size,) * num_whole
        if rest >= self.min_batch:
            return (*(self.batch_size,) * num_whole, rest)
        return (*(self.batch_size,) * (num_whole - 1), self.batch_size + rest)

    @property
    def num_steps(self) -> int:
        """The number of steps of an epoch."""
        return len(self.batch_sizes)

    @property
    def last_batch_size(self) -> int:
        """The number of images of the last step of an epoch."""
        return self.batch_sizes[-1]

    @property
    def num_images_per_epoch(self) -> int:
        """The number of images that an epoch sees, each once."""
        return sum(self.batch_sizes)


def training_batches(
    split: Indexed,
    plan: BatchPlan,
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    fill: Sequence[float],
    start_step: int = 0,
    rows_of: Callable[[int], slice] = lambda _: slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the augmented images (B, 3, H, W) uint8 and labels (B,) of an epoch from `start_step` on.

    Steps are the same whether or not the ones before were taken. For `fill` see `augment`. `rows_of` says, by
    the size of a batch, which of its images to yield: they are what they are in the whole batch.

    Raises:
        DataError: at once, if the images are too small for `config`.
        ValueError: at once, if `plan` is for another number of images.
    """
    if plan.num_images != len(split):
        raise ValueError(f"the plan is for {plan.num_images} images, the split has {len(split)}")
    check_augmentation(config, *split.image_shape[-2:])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        order = generator(Stream.ORDER, seed, epoch).permutation(len(split))[: plan.num_images_per_epoch]
        # once an epoch: a copy to a GPU waits until it has done all before
        places = torch.from_numpy(order).to(split.device).split(list(plan.batch_sizes))
        rows = [rows_of(size) for size in plan.batch_sizes]
        own = (place[chosen] for place, chosen in zip(places[start_step:], rows[start_step:], strict=True))
        found = split.batches_of(own)
        for step, (images, labels) in enumerate(found, start_step):
            indices = order[step * plan.batch_size :][: plan.batch_sizes[step]]
            yield (
                augment(
                    images, indices, config, seed=seed, epoch=epoch, step=step, fill=fill, rows=rows[step]
                ),
                labels,
            )

    return batches()


def micro_batches(images: Tensor, labels: Tensor, size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a batch into as few parts as hold at most `size` images each, equal to within one.

    None leaves it whole.
    """
    count = num_micro_batches(len(labels), size)
    return zip(images.tensor_split(count), labels.tensor_split(count), strict=True)


def num_micro_batches(batch_size: int, size: int | None) -> int:
    """Into how many parts `micro_batches` cuts a batch."""
    return 1 if size is None else -(-batch_size // size)


def sequential_batches(
    split: Indexed, batch_size: int, *, rank: int = 0, num_ranks: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images (B, 3, H, W) uint8 and labels (B,) once, in order; the last batch may be smaller.

    Of several ranks each has every `num_ranks`-th batch, and reads no other.
    """
    return split.batches_of(islice(in_order(len(split), batch_size), rank, None, num_ranks))


def sample_batches(
    split: Indexed, batch_size: int, num_images: int, *, rank: int = 0, num_ranks: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first `num_images` of the order: images (B, 3, H, W) uint8 and labels (B,).

    The last batch may be smaller; a single image left over joins the batch before, since BatchNorm may
    not be able to measure it alone. Indexes lazily, so that a mapped data set stays on the disk. Of a data
    set that cannot be shuffled it is the beginning. Of several ranks each has every `num_ranks`-th batch.

    Of fewer images than asked for, all are taken. Raises ConfigError for fewer than one batch needs.
    """
    num_images = min(num_images, len(split))
    plan = BatchPlan(num_images, min(batch_size, num_images), "keep", min_batch=min(2, batch_size))
    if split.can_shuffle:
        order = torch.from_numpy(generator(Stream.SAMPLE, len(split)).permutation(len(split)))
    else:
        order = torch.arange(len(split))
    yield from split.batches_of(order[:num_images].split(list(plan.batch_sizes))[rank::num_ranks])
