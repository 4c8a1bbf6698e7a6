"""A checkpoint with population statistics in place of its running statistics: how good, and how made.

The population is the data set's training split, unaugmented, in the order of `data/random_sample.py`. All is
computed as `bncli eval` computes it, autocast included, since that is where the statistics will be used.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from bncli.batchnorm import LayerConsistency, Recalibration, recalibrate, verify_fixed_point
from bncli.batchnorm.distance import nan_as_farthest
from bncli.checkpoints import Checkpoint, file_sha256, load_model, save_checkpoint
from bncli.data import Dataset, sequential_batches
from bncli.distributed import ALONE, Ranks
from bncli.errors import StoppedError
from bncli.evaluation import Outcomes, PairedDifference, Score, compare_outcomes, measure_outcomes
from bncli.evaluation.gap import PhaseProgress
from bncli.hardware import describe_machine
from bncli.recorded_config import MAX_EVAL_BATCH
from bncli.runtime import Runtime
from bncli.training.run import Run
from bncli.training.run_dir import RECALIBRATED, writing
from bncli.training.setup import training_sample

RecalibrationMethod = Literal["exact", "precise", "debias"]


@dataclass(frozen=True)
class Calibration:
    """How population statistics are measured: what `bncli recalibrate` and a run's end can choose."""

    method: RecalibrationMethod = "exact"
    num_images: int | None = None  # sample of training images; None: all
    batch_size: int | None = None  # of these images; None: runtime.eval_batch_size
    layers: str | None = None  # a glob; None: all
    tolerance: float | None = None  # standard error of a mean, in deviations, at which measuring stops

    def or_as_recorded(self, checkpoint: Checkpoint) -> "Calibration":
        """The same, with what is not given here taken from how the checkpoint was recalibrated."""
        record = checkpoint.recalibration or {}
        layers = record.get("layers")
        return replace(
            self,
            num_images=self.num_images or _count(record, "num_images"),
            batch_size=self.batch_size or _count(record, "batch_size", MAX_EVAL_BATCH),
            layers=self.layers or (layers if isinstance(layers, str) else None),
        )


@dataclass(frozen=True)
class Scores:
    """How good a classifier was before its running statistics were replaced, and after."""

    before: Score  # on the test split, in eval mode
    after: Score
    difference: PairedDifference  # after against before, image by image


@dataclass(frozen=True, eq=False)
class RecalibratedNetwork:
    """How far the layers moved, and what it changed."""

    recalibration: Recalibration
    scores: Scores | None  # None: it was not evaluated

    @property
    def verdict(self) -> str:
        """One sentence: whether it was worth it."""
        return "The network was not evaluated." if self.scores is None else self.scores.difference.verdict

    def to_dict(self) -> dict[str, Any]:
        """The JSON document: how good, the verdict, and how far each layer moved."""
        scores = (
            dict.fromkeys(("before", "after", "difference")) if self.scores is None else asdict(self.scores)
        )
        return {**scores, "verdict": self.verdict, **asdict(self.recalibration)}

    def __str__(self) -> str:
        """How far the layers moved, and the verdict."""
        return f"{self.recalibration}\n{self.verdict}"


@dataclass(frozen=True, eq=False)
class RecalibratedCheckpoint(RecalibratedNetwork):
    """The same, and the new checkpoint."""

    checkpoint: Checkpoint


@dataclass(frozen=True)
class Verification:
    """Running statistics against the training images that enter each layer in eval mode."""

    dataset: str
    num_images: int
    batch_size: int
    max_error: float  # relative, in any channel, up to which a layer counts as self-consistent
    layers: tuple[LayerConsistency, ...]

    @property
    def self_consistent(self) -> bool:
        """Whether no channel of any layer is further off; a value that is no number is."""
        return all(layer.max_relative_error <= self.max_error for layer in self.layers)

    @property
    def verdict(self) -> str:
        """One sentence: whether they are a fixed point, and where they are furthest off."""
        worst = max(self.layers, key=lambda layer: nan_as_farthest(layer.max_relative_error))
        error = f"{worst.max_relative_error:.2g} in {worst.name}"
        if self.self_consistent:
            return f"Self-consistent: no mean or variance differs from its input's by more than {error}."
        return (
            f"Not self-consistent: a mean or variance differs from its input's by {error};"
            f" {self.max_error:g} is allowed. Averages taken in training never fit that well; what"
            " bncli recalibrate -o NEW writes does."
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {"self_consistent": self.self_consistent, **asdict(self)}

    def __str__(self) -> str:
        """The verdict."""
        return self.verdict


def recalibrate_checkpoint(
    checkpoint: Checkpoint,
    dataset: Dataset,
    runtime: Runtime,
    how: Calibration,
    *,
    source: dict[str, str],
    eval_batch_size: int,
    evaluate: bool = True,
    ranks: Ranks = ALONE,
    progress: PhaseProgress = lambda phase, done, total: None,
) -> RecalibratedCheckpoint:
    """Measure, replace, and `evaluate` before and after; `checkpoint` itself is left as it was.

    `source` says where it came from (`file`, `sha256`) and is recorded. The new checkpoint has no optimiser:
    training cannot go on from it.

    Raises BncliError where nothing can be recalibrated: see `bncli.recalibrate`.
    """
    model = runtime.place_model(load_model(checkpoint))
    made = recalibrate_network(
        model,
        dataset,
        runtime,
        how,
        eval_batch_size=eval_batch_size,
        evaluate=evaluate,
        ranks=ranks,
        progress=progress,
    )
    scores = made.scores
    return RecalibratedCheckpoint(
        made.recalibration,
        scores,
        replace(
            checkpoint.finished(),
            state_dict=checkpoint.state_dict | running_stats(model),
            test_accuracy=None if scores is None else scores.after.accuracy,
            test_loss=None if scores is None else scores.after.loss,
            recalibration={
                **asdict(how),
                "num_images": made.recalibration.num_images,
                "batch_size": how.batch_size or eval_batch_size,
                "recalibrated_layers": [layer.name for layer in made.recalibration.layers],
                "source": source,
                "before": None if scores is None else asdict(scores.before),
                "after": None if scores is None else asdict(scores.after),
                "runtime": runtime.describe(),
                "machine": describe_machine(),
            },
        ),
    )


def recalibrate_network(
    model: nn.Module,
    dataset: Dataset,
    runtime: Runtime,
    how: Calibration,
    *,
    eval_batch_size: int,
    evaluate: bool = True,
    ranks: Ranks = ALONE,
    progress: PhaseProgress = lambda phase, done, total: None,
) -> RecalibratedNetwork:
    """Replace the running statistics of a placed network in eval mode.

    With `evaluate` it is a classifier, and evaluated before and after. Without, it is any network that takes
    a batch of images, and the data set needs no labels. Several `ranks` divide all images among themselves
    and get the same result.

    Raises BncliError where nothing can be recalibrated: see `bncli.recalibrate`.
    """
    size = how.batch_size or eval_batch_size
    num_images = min(how.num_images or len(dataset.train), len(dataset.train))

    def outcomes(phase: str) -> Outcomes | None:
        if not evaluate:
            return None
        return outcomes_on_test(model, dataset, runtime, eval_batch_size, phase, progress, ranks)

    with runtime.autocast():
        before = outcomes("test images before")
        done = recalibrate(
            model,
            None
            if how.method == "debias"
            else training_sample(dataset.train, runtime, size, num_images, ranks),
            method=how.method,
            layers=how.layers,
            tolerance=how.tolerance,
            group=ranks.group,
            progress=lambda number, of, images: progress(
                f"training images, pass {number} of {of}", images, num_images
            ),
        )
        after = outcomes("test images after")
    if before is None or after is None:
        return RecalibratedNetwork(done, None)
    return RecalibratedNetwork(done, Scores(before.score, after.score, compare_outcomes(before, after)))


def outcomes_on_test(
    model: nn.Module,
    dataset: Dataset,
    runtime: Runtime,
    batch_size: int,
    phase: str,
    progress: PhaseProgress,
    ranks: Ranks = ALONE,
) -> Outcomes:
    """What a placed classifier in eval mode makes of every test image; `phase` names it in `progress`.

    To be called inside `runtime.autocast()`. Raises DataError: see `measure_outcomes`.
    """
    batches = sequential_batches(dataset.test, batch_size, rank=ranks.rank, num_ranks=ranks.size)
    placed = ((runtime.place(images), labels) for images, labels in batches)
    return measure_outcomes(
        model,
        placed,
        group=ranks.group,
        progress=lambda done: progress(phase, done, len(dataset.test)),
    )


def save_recalibrated(
    run: Run, run_dir: Path, method: Literal["precise", "exact"], stop: Callable[[], bool]
) -> None:
    """Recalibrate last.pt of a finished run, in batches as BatchNorm saw in training, into a file beside it.

    Of several processes all call this, and share the images. Raises StoppedError when `stop`, which is asked
    after every batch, says so in one of them.
    """

    def ask(phase: str, done: int, total: int | None) -> None:
        if stop():
            raise StoppedError

    setup, path = run.setup, run_dir / "last.pt"
    made = recalibrate_checkpoint(
        setup.loaded(path),
        setup.dataset,
        setup.runtime,
        Calibration(method, batch_size=setup.norm_batch_size),
        source={"file": path.name, "sha256": file_sha256(path) if setup.is_main else ""},
        eval_batch_size=setup.config.runtime.eval_batch_size,
        ranks=setup.ranks,
        progress=ask,
    )
    if setup.is_main:
        with writing(run_dir):
            save_checkpoint(made.checkpoint, run_dir / RECALIBRATED)


def running_stats(model: nn.Module) -> dict[str, Tensor]:
    """The part of the state dict that recalibration writes; all other tensors stay the file's own."""
    return {
        key: value.to("cpu", copy=True)
        for key, value in model.state_dict().items()
        if key.endswith((".running_mean", ".running_var"))
    }


def verify_checkpoint(
    checkpoint: Checkpoint,
    dataset: Dataset,
    runtime: Runtime,
    how: Calibration,
    *,
    eval_batch_size: int,
    max_error: float,
    ranks: Ranks = ALONE,
    progress: PhaseProgress = lambda phase, done, total: None,
) -> Verification:
    """Whether the running statistics are those of the training images in eval mode: a fixed point.

    What `how` leaves open is as the checkpoint records of its recalibration: the same images again.

    Raises BncliError where no layer can be measured.
    """
    return verify_network(
        runtime.place_model(load_model(checkpoint)),
        dataset,
        runtime,
        how.or_as_recorded(checkpoint),
        eval_batch_size=eval_batch_size,
        max_error=max_error,
        ranks=ranks,
        progress=progress,
    )


def verify_network(
    model: nn.Module,
    dataset: Dataset,
    runtime: Runtime,
    how: Calibration,
    *,
    eval_batch_size: int,
    max_error: float,
    ranks: Ranks = ALONE,
    progress: PhaseProgress = lambda phase, done, total: None,
) -> Verification:
    """The same of a network that is placed already. Raises BncliError where no layer can be measured."""
    size = how.batch_size or eval_batch_size
    num_images = min(how.num_images or len(dataset.train), len(dataset.train))
    with runtime.autocast():
        layers = verify_fixed_point(
            model,
            training_sample(dataset.train, runtime, size, num_images, ranks),
            layers=how.layers,
            group=ranks.group,
            progress=lambda done: progress("training images, verifying", done, num_images),
        )
    return Verification(dataset.name, num_images, size, max_error, layers)


def _count(record: Mapping[str, object], key: str, largest: int | None = None) -> int | None:
    """A number from a checkpoint's record, which may come from a stranger: none may use up the memory."""
    value = record.get(key)
    if type(value) is not int or value < 1 or (largest is not None and value > largest):
        return None
    return value
