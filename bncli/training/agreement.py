"""Whether eval mode does as well as batch statistics at the end of a run: did the running ones keep up?

The same test images are computed twice, with running statistics and in batches of as many images as BatchNorm
normalised together in training. At most 2,000 images, drawn at random: so it costs no more than an evaluation
of 4,000, once in a run, and leaves the checkpoint as it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from bncli.batchnorm import batch_norm_layers
from bncli.batchnorm.modes import batch_statistics_mode, eval_mode
from bncli.checkpoints import Checkpoint, load_model
from bncli.data import sample_batches
from bncli.errors import StoppedError
from bncli.evaluation import Outcomes, PairedDifference, Score, compare_outcomes, measure_outcomes
from bncli.evaluation.gap import MAX_STANDARD_ERROR
from bncli.evaluation.outcomes import is_loss_far_lower
from bncli.training.setup import Setup

NUM_IMAGES = 2_000


@dataclass(frozen=True)
class Agreement:
    """The accuracy and loss of eval mode beside that of batch statistics, on the same test images."""

    num_images: int
    batch_size: int  # images whose batch statistics are taken together
    momentum: float | None  # of the first BatchNorm layer; None: the mean of all batches
    num_updates: int  # of its running statistics in training
    recalibrated: bool  # whether they were measured anew since
    running: Score  # eval mode
    batch: Score
    difference: PairedDifference  # batch statistics against eval mode, image by image

    @property
    def eval_mode_is_behind(self) -> bool:
        """Whether batch statistics do better by more than chance would explain."""
        return self.difference.is_gain or self.loss_is_behind

    @property
    def loss_is_behind(self) -> bool:
        """Whether they do so in the loss alone, and by far: accuracy does not show it."""
        return not self.difference.is_gain and is_loss_far_lower(self.running, self.batch, self.difference)

    @property
    def verdict(self) -> str:
        """One sentence: do they agree?"""
        momentum = "cumulative average" if self.momentum is None else f"momentum {self.momentum:g}"
        origin = "measured anew" if self.recalibrated else f"{momentum}, {self.num_updates:,} updates"
        if self.loss_is_behind:
            remedy = "" if self.recalibrated else " Train for more steps, or set train.recalibrate=precise."
            return (
                f"Running statistics ({origin}) do not fit the network: loss {self.running.loss:.4g} in eval"
                f" mode and {self.batch.loss:.4g} in batches of {self.batch_size:,}, though accuracy,"
                f" {self.running.accuracy:.2%} and {self.batch.accuracy:.2%}, does not show it"
                f" ({self.num_images:,} test images).{remedy}"
            )
        if self.eval_mode_is_behind:
            relation = "are behind batch statistics"
        elif self.difference.is_loss:
            relation = "do better than batch statistics"
        elif self.difference.accuracy_standard_error > MAX_STANDARD_ERROR:
            images = f"{self.num_images:,} test images"
            return (
                f"{images} are too few to tell whether running statistics ({origin}) agree with batch"
                f" statistics: accuracy {self.running.accuracy:.2%} in eval mode and"
                f" {self.batch.accuracy:.2%} in batches of {self.batch_size:,}."
            )
        else:
            relation = "agree with batch statistics within chance"
        return (
            f"Running statistics ({origin}) {relation}: accuracy {self.running.accuracy:.2%} in eval mode"
            f" and {self.batch.accuracy:.2%} in batches of {self.batch_size:,}"
            f" ({self.num_images:,} test images)."
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON document: all fields, and what follows from them."""
        return {
            "eval_mode_is_behind": self.eval_mode_is_behind,
            "loss_is_behind": self.loss_is_behind,
            "verdict": self.verdict,
            **asdict(self),
        }

    def __str__(self) -> str:
        """The verdict."""
        return self.verdict


def measure_agreement(checkpoint: Checkpoint, setup: Setup, stop: Callable[[], bool]) -> Agreement | None:
    """Compare on the run's test split; None where no layer has running statistics, or for a single image.

    Of several processes all call this, and share the batches.

    Raises StoppedError when `stop`, which is asked before every batch, says so.
    """
    runtime, ranks, test = setup.runtime, setup.ranks, setup.dataset.test
    model = runtime.place_model(load_model(checkpoint))
    layers = [layer for _, layer in batch_norm_layers(model) if layer.running_mean is not None]
    num_images = min(NUM_IMAGES, len(test))
    batch_size = min(setup.norm_batch_size, num_images)
    num_images -= num_images % batch_size  # a smaller last batch has other batch statistics
    if not layers or len(test) < 2:
        return None

    def outcomes() -> Outcomes:
        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in sample_batches(
                test, batch_size, num_images, rank=ranks.rank, num_ranks=ranks.size
            ):
                if stop():
                    raise StoppedError
                yield runtime.place(images), labels

        return measure_outcomes(model, batches, group=ranks.group)

    with runtime.autocast():
        with eval_mode(model):
            running = outcomes()
        with batch_statistics_mode(model):
            batch = outcomes()
    tracked = layers[0].num_batches_tracked
    return Agreement(
        num_images=num_images,
        batch_size=batch_size,
        momentum=layers[0].momentum,
        num_updates=0 if tracked is None else int(tracked),
        recalibrated=checkpoint.recalibration is not None,
        running=running.score,
        batch=batch.score,
        difference=compare_outcomes(running, batch),
    )
