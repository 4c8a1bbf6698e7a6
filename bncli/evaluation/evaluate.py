"""Accuracy and loss of a classifier in eval mode."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bncli.batches import Batches, GetTensor
from bncli.batchnorm.modes import eval_mode, preserved_buffers
from bncli.distributed.ranks import Ranks
from bncli.distributed.shards import labelled_once
from bncli.distributed.wrapped import unwrapped, whole_parameters
from bncli.errors import DataError
from bncli.forward import forward
from bncli.wording import plural

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Evaluation:
    """How well a classifier does on one pass over a data set."""

    num_images: int
    accuracy: float  # fraction in [0, 1]; a row of logits with a NaN counts as wrong
    loss: float  # mean cross-entropy per image, nats
    per_class_accuracy: tuple[float | None, ...]  # fractions, by label; None: no image of that class
    seconds: float  # wall-clock time of the pass, loading included
    images_per_second: float
    confidence: float | None = None  # mean over images of the largest probability; None: not measured

    def __str__(self) -> str:
        """Accuracy, loss and speed in one line."""
        return (
            f"accuracy {self.accuracy:.2%} of {plural(self.num_images, 'image')} in eval mode"
            f" (loss {self.loss:.4f}), {self.images_per_second:,.0f} images/s"
        )


def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    group: "ProcessGroup | None" = None,
    get_input: GetTensor | None = None,
    get_labels: GetTensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate any module that returns logits (N, num_classes) on labelled batches: see `bncli.batches`.

    The model runs in eval mode without gradients and is left as it was: every module's mode and every
    buffer. Batches are moved to its device. Logits are taken to float32 at least, the sums are float64.
    For another precision call this inside `torch.autocast`. `progress` is given the number of images
    done after every batch.

    With a process `group` every rank calls it with its own part of the data, and gets the result of all of
    it; batches and their order are those of `measure_population`. The images that a DataLoader's
    DistributedSampler repeats are left out. A rank may have no batch. `progress` then counts the images of
    all ranks, roughly.

    Raises DataError if there are no images, or a label is not a class of the model.
    """
    start = time.perf_counter()
    model, ranks = unwrapped(model), Ranks.of(group)
    sums = _Sums(ranks)
    with ranks.together(), whole_parameters(model):
        with eval_mode(model), preserved_buffers(model), torch.no_grad():
            for inputs, labels in labelled_once(batches, get_input, get_labels):
                sums.add(forward(model, inputs), labels)
                if progress is not None:
                    progress(sums.images_so_far)
        sums = sums.of_all_ranks()
        if sums.num_images == 0:
            raise DataError("there is nothing to evaluate: the data set has no images")
    if progress is not None and ranks.size > 1:
        progress(sums.num_images)
    seconds = time.perf_counter() - start
    num_images = sums.num_images
    per_class = zip(sums.correct.tolist(), sums.total.tolist(), strict=True)
    return Evaluation(
        num_images=num_images,
        accuracy=int(sums.correct.sum()) / num_images,
        loss=sum(one.loss for one in sums.batches) / num_images,
        per_class_accuracy=tuple(right / count if count else None for right, count in per_class),
        seconds=seconds,
        images_per_second=num_images / seconds,
        confidence=sum(one.confidence for one in sums.batches) / num_images,
    )


@dataclass(frozen=True)
class _BatchSums:
    """Of one batch's images."""

    index: int  # of the batch in the whole data set
    num_images: int
    loss: float
    confidence: float


class _Sums:
    """What has been added up so far."""

    def __init__(self, ranks: Ranks) -> None:
        self.batches: list[_BatchSums] = []  # apart, so that floats are added in one order
        self.num_images = 0
        self.correct = self.total = torch.zeros(0, dtype=torch.int64)  # (num_classes,)
        self._ranks = ranks

    @property
    def images_so_far(self) -> int:
        """The same, with those of other ranks as far as they can be known."""
        first = self.batches[0].num_images
        return self._ranks.images_so_far(self.num_images, len(self.batches), first)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take in the logits (N, num_classes) of one batch."""
        losses, hits, classes = score_images(logits, labels)
        self.correct = _add_counts(self.correct, torch.bincount(classes[hits], minlength=logits.shape[1]))
        self.total = _add_counts(self.total, torch.bincount(classes, minlength=logits.shape[1]))
        self.num_images += len(classes)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.batches.append(
            _BatchSums(
                self._ranks.rank + len(self.batches) * self._ranks.size,
                len(classes),
                float(losses.sum()),
                float(wide.softmax(1).amax(1).sum()),
            )
        )

    def of_all_ranks(self) -> "_Sums":
        """The same sums, of the batches of all."""
        whole = _Sums(self._ranks)
        for batches, correct, total in self._ranks.gather((self.batches, self.correct, self.total)):
            whole.batches += batches
            whole.num_images += sum(one.num_images for one in batches)
            whole.correct = _add_counts(whole.correct, correct)
            whole.total = _add_counts(whole.total, total)
        whole.batches.sort(key=lambda one: one.index)
        return whole


def score_images(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per image, on the CPU: loss (N,) float64, whether it is right (N,) bool, label (N,) int64."""
    if labels.shape != logits.shape[:1]:
        raise DataError(f"labels of shape {tuple(labels.shape)}, expected one per input: ({len(logits)},)")
    classes = labels.to("cpu", torch.int64)
    low, high = int(classes.min()), int(classes.max())
    if low < 0 or high >= logits.shape[1]:  # on a GPU cross_entropy would take the process down
        found = low if low < 0 else high
        raise DataError(f"label {found} found, but the model has the classes 0 to {logits.shape[1] - 1}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, classes.to(logits.device), reduction="none")
    # argmax takes a NaN for the largest value, and would find a broken model right about class 0
    hits = (logits.argmax(1).cpu() == classes) & ~logits.isnan().any(1).cpu()
    return losses.cpu().double(), hits, classes


def _add_counts(counts: Tensor, added: Tensor) -> Tensor:
    """Both together; one that is empty has seen no batch, and does not know the number of classes."""
    if not counts.numel() or not added.numel():
        return counts if counts.numel() else added
    return counts + added
