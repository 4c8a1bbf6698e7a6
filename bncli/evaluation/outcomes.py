"""What a classifier made of every single image, so that two computations can be compared image by image.

Accuracies of two variants of one network on the same images differ in few images only. Their difference is
therefore known far better than either accuracy, and only a paired test does justice to it: McNemar's (1947),
with Edwards' correction for continuity (1948).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bncli.batches import Batches, GetTensor
from bncli.batchnorm.modes import preserved_buffers
from bncli.distributed.ranks import Ranks
from bncli.distributed.shards import labelled_once
from bncli.distributed.wrapped import unwrapped, whole_parameters
from bncli.errors import BncliError, DataError
from bncli.evaluation.evaluate import score_images
from bncli.evaluation.sweep import NORMAL_QUANTILE
from bncli.forward import forward, is_too_few_values
from bncli.wording import plural

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# A loss is far lower where it is less than half, by more than one nat (the true class is e times likelier)
# and by more than chance: no network that is too sure of itself does that, nor the noise of small batches
MIN_LOSS_DIFFERENCE = 1.0
MIN_STANDARD_ERRORS = 5.0
MIN_IMAGES = 30  # of fewer the standard error itself is not known well enough


@dataclass(frozen=True)
class Score:
    """How well a classifier does on some images."""

    accuracy: float  # fraction in [0, 1]; a row of logits with a NaN counts as wrong
    loss: float  # mean cross-entropy per image, nats


@dataclass(frozen=True, eq=False)
class Outcomes:
    """One value per image, in the order of the batches."""

    right: Tensor  # (N,) bool
    losses: Tensor  # (N,) float64, cross-entropy in nats

    def __str__(self) -> str:
        """How many images, and how well."""
        images, score = plural(len(self.right), "image"), self.score
        return f"{images}: accuracy {score.accuracy:.2%}, loss {score.loss:.4f}"

    @property
    def score(self) -> Score:
        """Accuracy and mean loss."""
        return Score(int(self.right.sum()) / len(self.right), float(self.losses.sum()) / len(self.right))


@dataclass(frozen=True)
class PairedDifference:
    """What the second of two computations of the same images changes: second minus first."""

    num_images: int
    num_gained: int  # images that only the second gets right
    num_lost: int  # images that only the first gets right
    accuracy: float  # fraction
    accuracy_standard_error: float
    loss: float  # nats
    loss_standard_error: float

    @property
    def is_gain(self) -> bool:
        """Whether the second is more accurate by more than chance would explain (5 %, two-sided)."""
        return self._exceeds_chance(self.num_gained - self.num_lost)

    @property
    def is_loss(self) -> bool:
        """Whether the second is less accurate by more than chance would explain (5 %, two-sided)."""
        return self._exceeds_chance(self.num_lost - self.num_gained)

    @property
    def verdict(self) -> str:
        """One sentence: was the change worth it? Only what McNemar's test tells from chance counts."""
        points, error = 100 * self.accuracy, 100 * self.accuracy_standard_error
        numbers = (
            f"{points:+.2f} points of accuracy (standard error {error:.2f},"
            f" {plural(self.num_gained, 'image')} gained, {self.num_lost:,} lost),"
            f" {self.loss:+.4f} in loss (standard error {self.loss_standard_error:.4f})"
        )
        if self.is_gain:
            return f"A gain: {numbers}."
        if self.is_loss:
            return f"Worse, keep the old checkpoint: {numbers}."
        return f"No gain beyond chance: {numbers}."

    def __str__(self) -> str:
        """The verdict."""
        return self.verdict

    def _exceeds_chance(self, surplus: int) -> bool:
        return surplus - 1 > NORMAL_QUANTILE * math.sqrt(self.num_gained + self.num_lost)


def measure_outcomes(
    model: nn.Module,
    batches: Batches,
    *,
    num_images: int | None = None,
    group: "ProcessGroup | None" = None,
    get_input: GetTensor | None = None,
    get_labels: GetTensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Outcomes:
    """Compute labelled batches in the model's mode; its buffers are left as they were.

    `num_images` ends the pass with the batch that reaches so many. `progress` is given the number of images
    done after every batch. For another precision call this inside `torch.autocast`. `group` is that of
    `evaluate`; the outcomes are in the order of one process.

    Raises DataError if there are no images, or a label is not a class of the model; BncliError where a layer
    that uses batch statistics gets a single value per channel.
    """
    model, ranks = unwrapped(model), Ranks.of(group)
    own: list[tuple[int, Tensor, Tensor]] = []  # of each batch: its index in the whole data set, outcomes
    done, is_done = 0, False
    with ranks.together(), whole_parameters(model):
        with preserved_buffers(model), torch.no_grad():
            pairs = labelled_once(batches, get_input, get_labels)
            while not is_done:
                pair = next(pairs, None)
                if pair is not None:
                    inputs, labels = pair
                    loss, hits, _ = score_images(_logits(model, inputs), labels)
                    own.append((ranks.rank + len(own) * ranks.size, hits, loss))
                    done += len(labels)
                    if progress is not None:
                        progress(ranks.images_so_far(done, len(own), len(own[0][1])))
                is_done = pair is None
                if num_images is not None:  # of all ranks, which go on meeting until there are so many
                    totals, have_all = zip(*ranks.gather((done, is_done)), strict=True)
                    is_done = sum(totals) >= num_images or all(have_all)
        found = sorted((one for part in ranks.gather(own) for one in part), key=lambda one: one[0])
        if not found:
            raise DataError("there is nothing to evaluate: the data set has no images")
    _, right, losses = zip(*_until(found, num_images), strict=True)
    outcomes = Outcomes(torch.cat(right), torch.cat(losses))
    if progress is not None and ranks.size > 1:
        progress(len(outcomes.right))
    return outcomes


def compare_outcomes(first: Outcomes, second: Outcomes) -> PairedDifference:
    """The second computation against the first one of the same images, in the same order.

    Raises ValueError where they are of different numbers of images.
    """
    num_images = len(first.right)
    if num_images != len(second.right):
        raise ValueError(f"outcomes of {num_images} and of {len(second.right)} images cannot be paired")
    gained, lost = second.right & ~first.right, first.right & ~second.right
    accuracy, accuracy_error = _mean_and_error(gained.double() - lost.double())
    loss, loss_error = _mean_and_error(second.losses - first.losses)
    return PairedDifference(
        num_images=num_images,
        num_gained=int(gained.sum()),
        num_lost=int(lost.sum()),
        accuracy=accuracy,
        accuracy_standard_error=accuracy_error,
        loss=loss,
        loss_standard_error=loss_error,
    )


def is_loss_far_lower(first: Score, second: Score, difference: PairedDifference) -> bool:
    """Whether the second computation's loss is so much lower that neither chance nor taste explains it.

    A first loss that is no finite number, where the second is one, counts as well.
    """
    if not math.isfinite(first.loss):
        return math.isfinite(second.loss)
    gain = -difference.loss
    return (
        difference.num_images >= MIN_IMAGES
        and gain > max(MIN_LOSS_DIFFERENCE, second.loss)
        and gain > MIN_STANDARD_ERRORS * difference.loss_standard_error
    )


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    try:
        return forward(model, inputs)
    except ValueError as error:
        if not is_too_few_values(error):
            raise
        raise BncliError(
            "a batch of test images gives BatchNorm a single value per channel: take larger batches"
        ) from None


def _until(
    batches: list[tuple[int, Tensor, Tensor]], num_images: int | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Batches up to the one that reaches so many images: other ranks may have computed later ones."""
    seen = 0
    for batch in batches:
        if num_images is not None and seen >= num_images:
            return
        yield batch
        seen += len(batch[1])


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of values (N,) and its standard error; NaN for a single value."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error
