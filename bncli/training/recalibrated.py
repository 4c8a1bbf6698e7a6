"""A checkpoint with population statistics in place of its running statistics: how good, and how made.

The population is the data set's training split, unaugmented, in the order of `data/random_sample.py`. All is
computed as `bncli eval` computes it, autocast included, since that is where the statistics will be used.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from bncli.batchnorm import LayerConsistency, Recalibration, recalibrate, verify_fixed_point
from bncli.checkpoints import Checkpoint, file_sha256, load_checkpoint, load_model, save_checkpoint
from bncli.data import Dataset, sequential_batches
from bncli.errors import StoppedError
from bncli.evaluation import Outcomes, PairedDifference, Score, compare_outcomes, measure_outcomes
from bncli.hardware import describe_machine
from bncli.models.convnet import ConvNet
from bncli.runtime import Runtime
from bncli.training.calibration_images import training_sample
from bncli.training.run import Run
from bncli.training.run_dir import RECALIBRATED, writing

RecalibrationMethod = Literal["exact", "precise", "debias"]
PhaseProgress = Callable[[str, int], None]  # (phase, images done in it)


@dataclass(frozen=True, eq=False)
class RecalibratedCheckpoint:
    """The new checkpoint beside what it was made from."""

    checkpoint: Checkpoint
    recalibration: Recalibration
    before: Score  # on the test split, in eval mode
    after: Score
    difference: PairedDifference  # after against before, image by image


def recalibrate_checkpoint(
    checkpoint: Checkpoint,
    dataset: Dataset,
    runtime: Runtime,
    *,
    source: dict[str, str],
    eval_batch_size: int,
    method: RecalibrationMethod = "exact",
    num_images: int | None = None,
    batch_size: int | None = None,
    layers: str | None = None,
    tolerance: float | None = None,
    progress: PhaseProgress = lambda phase, num_images: None,
) -> RecalibratedCheckpoint:
    """Measure, replace, and evaluate before and after; `checkpoint` itself is left as it was.

    `source` says where it came from (`file`, `sha256`) and is recorded. `num_images` is the size of the
    sample of training images (default: all), `batch_size` that of its batches (default:
    `eval_batch_size`), `layers` a glob. The new checkpoint has no optimiser: training cannot go on from it.

    Raises BncliError where nothing can be recalibrated: see `bncli.batchnorm.population.recalibrate`.
    """
    size = batch_size or eval_batch_size
    sample = min(num_images or len(dataset.train), len(dataset.train))
    model = runtime.place_model(load_model(checkpoint))

    def outcomes(phase: str) -> Outcomes:
        batches = sequential_batches(dataset.test, eval_batch_size)
        placed = ((runtime.place(images), labels) for images, labels in batches)
        return measure_outcomes(model, placed, progress=partial(progress, phase))

    with runtime.autocast():
        before = outcomes("test images before")
        done = recalibrate(
            model,
            None if method == "debias" else training_sample(dataset.train, runtime, size, sample),
            method=method,
            layers=layers,
            tolerance=tolerance,
            progress=lambda number, of, images: progress(f"training images, pass {number} of {of}", images),
        )
        after = outcomes("test images after")
    difference = compare_outcomes(before, after)
    record = {
        "method": method,
        "num_images": done.num_images,
        "batch_size": size,
        "layers": layers,
        "tolerance": tolerance,
        "recalibrated_layers": [layer.name for layer in done.layers],
        "source": source,
        "before": asdict(before.score),
        "after": asdict(after.score),
        "runtime": runtime.describe(),
        "machine": describe_machine(),
    }
    made = replace(
        checkpoint.finished(),
        state_dict=checkpoint.state_dict | _running_stats(model),
        test_accuracy=after.score.accuracy,
        test_loss=after.score.loss,
        recalibration=record,
    )
    return RecalibratedCheckpoint(made, done, before.score, after.score, difference)


def save_recalibrated(
    run: Run, run_dir: Path, method: Literal["precise", "exact"], stop: Callable[[], bool]
) -> None:
    """Recalibrate last.pt of a finished run, in batches as BatchNorm saw in training, into a file beside it.

    Raises StoppedError when `stop`, which is asked after every batch, says so.
    """

    def ask(phase: str, num_images: int) -> None:
        if stop():
            raise StoppedError

    setup, path = run.setup, run_dir / "last.pt"
    made = recalibrate_checkpoint(
        load_checkpoint(path),
        setup.dataset,
        setup.runtime,
        source={"file": path.name, "sha256": file_sha256(path)},
        eval_batch_size=setup.config.runtime.eval_batch_size,
        method=method,
        batch_size=setup.norm_batch_size,
        progress=ask,
    )
    with writing(run_dir):
        save_checkpoint(made.checkpoint, run_dir / RECALIBRATED)


def _running_stats(model: ConvNet) -> dict[str, Tensor]:
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
    *,
    batch_size: int,
    num_images: int,
    layers: str | None = None,
    progress: PhaseProgress = lambda phase, num_images: None,
) -> tuple[LayerConsistency, ...]:
    """Whether the running statistics are those of the training images in eval mode: a fixed point.

    Raises BncliError where no layer can be measured.
    """
    model: ConvNet = runtime.place_model(load_model(checkpoint))
    with runtime.autocast():
        return verify_fixed_point(
            model,
            training_sample(dataset.train, runtime, batch_size, num_images),
            layers=layers,
            progress=partial(progress, "training images, verifying"),
        )
