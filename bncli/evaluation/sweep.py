"""Accuracy against batch size: flat in eval mode, falling apart where BatchNorm measures small batches."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bncli.batches import Batches, GetTensor
from bncli.batchnorm.modes import batch_statistics_mode, eval_mode, preserved_buffers
from bncli.determinism.difference import predictions
from bncli.determinism.fixed_shape import without_fixed_shape
from bncli.distributed.ranks import Ranks
from bncli.distributed.wrapped import unwrapped, whole_parameters
from bncli.errors import DataError
from bncli.evaluation.labelled_images import labelled_images
from bncli.forward import forward, is_too_few_values
from bncli.indexed import Indexed
from bncli.sample import random_order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Place = Callable[[Tensor], Tensor]
_BatchHits = tuple[int, int, int]  # where a batch starts, how many images are right, how many count

NORMAL_QUANTILE = 1.959964  # of 0.975: two-sided 95 %


@dataclass(frozen=True)
class SweepPoint:
    """Accuracies as fractions in [0, 1] with 95 % confidence intervals, at one batch size.

    None for batch statistics where BatchNorm refuses the batch: a single value per channel.
    """

    batch_size: int
    eval_accuracy: float
    eval_interval: tuple[float, float]
    batch_statistics_accuracy: float | None
    batch_statistics_interval: tuple[float, float] | None

    def __str__(self) -> str:
        """Both accuracies at this batch size."""
        measured = self.batch_statistics_accuracy
        refused = "refused by BatchNorm" if measured is None else f"{measured:.2%}"
        return f"batches of {self.batch_size}: eval mode {self.eval_accuracy:.2%}, batch statistics {refused}"


def sweep_batch_sizes(
    model: nn.Module,
    batches: Batches | Indexed,
    batch_sizes: Sequence[int],
    *,
    seed: int = 0,
    place: Place = lambda images: images,
    get_input: GetTensor | None = None,
    get_labels: GetTensor | None = None,
    group: "ProcessGroup | None" = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[SweepPoint, ...]:
    """Measure accuracy in eval mode and with batch statistics, in batches of each size, in rising order.

    All images are held in memory, unless they are given as a pair of tensors, images (N, ...) and labels
    (N,), or as `bncli.indexed`. `place` brings a batch to where and how the model computes. They are put into
    one random order, drawn from `seed`: batches of a data set that is sorted by
    class would not look like the training batches. With batch statistics only
    BatchNorm layers leave eval mode; of a `FixedShape` it is the module inside that is measured. A last
    batch is filled up from the start, so that all have one size, but every image counts once. Modes and
    buffers are restored, also if the model raises. `progress` is given the passes done and their total.
    The ranks of a process `group` are all given all images, and share the batches of each pass.

    Raises DataError without images or for a batch larger than all of them, ValueError below 1.
    """
    sizes = sorted(set(batch_sizes))
    data, labels = labelled_images(batches, get_input, get_labels)
    if len(data) == 0 or len(data) != len(labels):
        raise DataError(f"nothing to measure: {len(data)} images with {len(labels)} labels")
    if not sizes or sizes[0] < 1:
        raise ValueError(f"batch sizes must be 1 or more, got {list(batch_sizes)}")
    if sizes[-1] > len(data):
        raise DataError(f"batches of {sizes[-1]} asked for, but there are {len(data)} images")
    order = random_order(len(data), seed)
    model, ranks = unwrapped(model), Ranks.of(group)
    inner = without_fixed_shape(model)
    points = []
    for done, size in enumerate(sizes):
        with ranks.together(), whole_parameters(model), preserved_buffers(model), torch.no_grad():
            with eval_mode(model):
                plain = Hits.of(ranks.gather(list(_hits(model, data, order, size, place, ranks))))
            if progress is not None:
                progress(2 * done + 1, 2 * len(sizes))
            with batch_statistics_mode(inner):
                measured = _count_unless_refused(inner, data, order, size, place, ranks)
        if progress is not None:
            progress(2 * done + 2, 2 * len(sizes))
        points.append(
            SweepPoint(
                batch_size=size,
                eval_accuracy=plain.accuracy,
                eval_interval=wilson_interval(plain.accuracy, len(data)),
                batch_statistics_accuracy=None if measured is None else measured.accuracy,
                batch_statistics_interval=None if measured is None else measured.interval(),
            )
        )
    return tuple(points)


@dataclass(frozen=True)
class Hits:
    """How many images of each batch were right."""

    right: Tensor  # (num_batches,) float64
    counted: Tensor  # (num_batches,) float64, images that count

    @classmethod
    def of(cls, ranks: Iterable[list[_BatchHits]]) -> "Hits":
        """Of the batches that each rank has."""
        _, right, counted = zip(*sorted(one for batches in ranks for one in batches), strict=True)
        return cls(torch.tensor(right).double(), torch.tensor(counted).double())

    @property
    def accuracy(self) -> float:
        """Fraction in [0, 1]."""
        return float(self.right.sum() / self.counted.sum())

    def design_effect(self) -> float:
        """By how much the images' common batches widen the variance of the accuracy (Kish 1965), at least 1.

        Images that share batch statistics are right or wrong together. The variance between batches says
        how much: that of the ratio estimator, over that of as many independent images.
        """
        num_images, num_batches = float(self.counted.sum()), len(self.right)
        independent = self.accuracy * (1 - self.accuracy) * num_images
        if independent == 0 or num_batches < 2:
            return 1.0
        between = float((self.right - self.counted * self.accuracy).square().sum())
        return max(1.0, between * num_batches / (num_batches - 1) / independent)

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval for as many independent images as these are worth (Dean & Pagano 2015)."""
        return wilson_interval(self.accuracy, float(self.counted.sum()) / self.design_effect())


def wilson_interval(accuracy: float, num_images: float) -> tuple[float, float]:
    """The 95 % score interval of a fraction among so many independent images (Wilson 1927)."""
    z = NORMAL_QUANTILE
    center = (accuracy + z * z / (2 * num_images)) / (1 + z * z / num_images)
    spread = accuracy * (1 - accuracy) / num_images + (z / (2 * num_images)) ** 2
    half_width = z * math.sqrt(spread) / (1 + z * z / num_images)
    return max(0.0, center - half_width), min(1.0, center + half_width)


def _count_unless_refused(
    model: nn.Module, data: Indexed, order: Tensor, size: int, place: Place, ranks: Ranks
) -> Hits | None:
    own: list[_BatchHits] | None = None
    try:
        own = list(_hits(model, data, order, size, place, ranks))
    except ValueError as error:
        if not is_too_few_values(error):
            raise
    found = ranks.gather(own)  # of few batches some rank has none that is refused
    return None if None in found else Hits.of(one for one in found if one is not None)


def _hits(
    model: nn.Module, data: Indexed, order: Tensor, size: int, place: Place, ranks: Ranks
) -> Iterator[_BatchHits]:
    """For every batch of this rank, its start, how many of its images are right, and how many count."""
    starts = range(0, len(order), size)[ranks.rank :: ranks.size]
    batches = (order[torch.arange(start, start + size) % len(order)] for start in starts)
    for start, (images, labels) in zip(starts, data.batches_of(batches), strict=True):
        num_counted = min(size, len(order) - start)
        right = predictions(forward(model, place(images))).cpu() == labels.cpu()
        yield start, int(right[:num_counted].sum()), num_counted
