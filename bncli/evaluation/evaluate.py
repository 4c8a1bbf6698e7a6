"""Accuracy and loss of a classifier in eval mode."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bncli.batches import Batches, GetTensor, labelled
from bncli.batchnorm.modes import eval_mode, preserved_buffers
from bncli.errors import DataError
from bncli.forward import forward
from bncli.wording import plural


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
    get_input: GetTensor | None = None,
    get_labels: GetTensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate any module that returns logits (N, num_classes) on labelled batches: see `bncli.batches`.

    The model runs in eval mode without gradients and is left as it was: every module's mode and every
    buffer. Batches are moved to its device. Logits are taken to float32 at least, the sums are float64.
    For another precision call this inside `torch.autocast`. `progress` is given the number of images
    done after every batch.

    Raises DataError if there are no images, or a label is not a class of the model.
    """
    start = time.perf_counter()
    num_images = 0
    loss = confidence = 0.0
    correct = total = torch.zeros(0, dtype=torch.int64)  # (num_classes,)
    with eval_mode(model), preserved_buffers(model), torch.no_grad():
        for inputs, labels in labelled(batches, get_input, get_labels):
            logits = forward(model, inputs)  # (N, num_classes)
            losses, hits, classes = score_images(logits, labels)
            correct = _add_counts(correct, classes[hits], logits.shape[1])
            total = _add_counts(total, classes, logits.shape[1])
            loss += float(losses.sum())
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            confidence += float(wide.softmax(1).amax(1).sum())
            num_images += len(classes)
            if progress is not None:
                progress(num_images)
    if num_images == 0:
        raise DataError("there is nothing to evaluate: the data set has no images")
    seconds = time.perf_counter() - start
    per_class = zip(correct.tolist(), total.tolist(), strict=True)
    return Evaluation(
        num_images=num_images,
        accuracy=int(correct.sum()) / num_images,
        loss=loss / num_images,
        per_class_accuracy=tuple(right / count if count else None for right, count in per_class),
        seconds=seconds,
        images_per_second=num_images / seconds,
        confidence=confidence / num_images,
    )


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


def _add_counts(counts: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    added = torch.bincount(classes, minlength=num_classes)
    return added if counts.numel() == 0 else counts + added
