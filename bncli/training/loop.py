"""The training loop, from the first step to the last checkpoint.

The order of the images and their augmentation are functions of (seed, epoch, step), and so is the
learning rate. Nothing else is random, so a run that was interrupted continues bit for bit.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bncli.checkpoint import save_checkpoint
from bncli.config import Config
from bncli.data import Progress as DataProgress
from bncli.data import training_batches
from bncli.errors import RunError
from bncli.stats import EpochStatistics
from bncli.training.optimizer import learning_rate_at
from bncli.training.run import Run, load_last
from bncli.training.run_dir import append_metrics, create_run_dir, keep_metrics_until, writing
from bncli.training.setup import Setup, prepare


@dataclass(frozen=True)
class Started:
    """Reported once, when everything is decided and the first step is next."""

    setup: Setup
    run_dir: Path
    epoch: int  # epochs finished already: 0, or more in a resumed run


@dataclass(frozen=True)
class StepDone:
    """Reported after every training step."""

    epoch: int  # from 1
    step: int  # of the whole run, from 1
    num_images: int


@dataclass(frozen=True)
class EpochDone:
    """Reported after every epoch, once its checkpoint is on the disk."""

    metrics: dict[str, Any]  # the line of metrics.jsonl


Report = Callable[[Started | StepDone | EpochDone], None]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run has to show."""

    run_dir: Path
    checkpoint: Path
    best_checkpoint: Path
    test_accuracy: float  # of the last epoch, as a fraction
    test_loss: float  # nats
    best_accuracy: float
    epochs: int
    seconds: float  # of all epochs: training, evaluation and checkpoints
    images_per_second: float  # of all epochs, evaluation and checkpoints included


def train(
    config: Config,
    run_dir: str | Path,
    *,
    resume: bool = False,
    report: Report = lambda _: None,
    data_progress: DataProgress | None = None,
) -> TrainResult:
    """Train the configured network and write its checkpoints into `run_dir`.

    With `resume` the run in `run_dir` continues after its last finished epoch; on a CPU it ends with
    the same bits as an uninterrupted one.

    Raises:
        BncliError: on a configuration, data or directory that cannot be used, and when the loss stops
            being finite.
    """
    run_dir = Path(run_dir)
    last = load_last(run_dir, config) if resume else None
    setup = prepare(config, progress=data_progress)
    if not resume:
        create_run_dir(run_dir, config)
    run = Run.restore(setup, last) if last else Run.start(setup)
    with writing(run_dir):
        keep_metrics_until(run_dir / "metrics.jsonl", run.epoch)

    report(Started(setup, run_dir, run.epoch))
    while run.epoch < config.train.epochs:
        start = time.perf_counter()
        metrics = _train_epoch(run, report)
        evaluation = run.evaluate()
        is_best = evaluation.accuracy > run.best_accuracy or run.epoch == 0
        run.best_accuracy = max(run.best_accuracy, evaluation.accuracy)
        run.epoch += 1
        run.seconds += time.perf_counter() - start
        metrics |= {
            "test_loss": evaluation.loss,
            "test_accuracy": evaluation.accuracy,
            "seconds": run.seconds,
        }
        with writing(run_dir):
            append_metrics(run_dir / "metrics.jsonl", metrics)
            last = run.checkpoint(evaluation)
            if is_best:
                save_checkpoint(replace(last, optimizer=None), run_dir / "best.pt")
            save_checkpoint(last, run_dir / "last.pt")
        report(EpochDone(metrics))

    # every configuration has at least one epoch, and its end is evaluated
    assert last is not None and last.test_accuracy is not None and last.test_loss is not None
    return TrainResult(
        run_dir=run_dir,
        checkpoint=run_dir / "last.pt",
        best_checkpoint=run_dir / "best.pt",
        test_accuracy=last.test_accuracy,
        test_loss=last.test_loss,
        best_accuracy=last.best_accuracy,
        epochs=last.epoch,
        seconds=last.seconds,
        images_per_second=last.epoch * setup.plan.num_images_per_epoch / last.seconds,
    )


def _train_epoch(run: Run, report: Report) -> dict[str, Any]:
    """One pass over the training images; returns the training half of the epoch's metrics.

    Raises:
        RunError: when the loss is no longer a finite number.
    """
    setup, config = run.setup, run.setup.config
    statistics = EpochStatistics(run.model)
    loss_sum = torch.zeros((), device=setup.runtime.device)
    num_correct = torch.zeros((), dtype=torch.int64, device=setup.runtime.device)
    num_images = 0
    run.model.train()
    start = time.perf_counter()
    batches = training_batches(
        setup.dataset.train,
        setup.plan,
        config.augment,
        seed=config.train.seed,
        epoch=run.epoch,
        fill=setup.normalization.mean,
    )
    for images, labels in batches:
        loss, hits = training_step(run, images, labels)
        statistics.observe()
        # sums stay on the device: reading them would make it wait in every step
        loss_sum += loss * len(labels)
        num_correct += hits
        num_images += len(labels)
        report(StepDone(run.epoch + 1, run.step, len(labels)))
    train_loss = loss_sum.item() / num_images
    if not math.isfinite(train_loss):
        raise RunError(
            f"the loss became {train_loss} in epoch {run.epoch + 1}, at a learning rate of"
            f" {run.learning_rate:.3g}; lower train.learning_rate (earlier checkpoints are kept)"
        )
    return {
        "epoch": run.epoch + 1,
        "step": run.step,
        "learning_rate": run.learning_rate,
        "train_loss": train_loss,
        "train_accuracy": num_correct.item() / num_images,
        "images_per_second": num_images / (time.perf_counter() - start),
        "layers": [
            {
                "name": layer.name,
                "running_mean_norm": layer.running_mean_norm,
                "running_var_norm": layer.running_var_norm,
                "mean_shift": layer.mean_shift,
                "var_ratio": layer.var_ratio,
            }
            for layer in statistics.finish()
        ],
    }


def training_step(run: Run, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One step of gradient descent on uint8 images (B, 3, H, W) with labels (B,).

    Returns the batch's mean loss in nats and its number of correct predictions, both on the device.
    """
    setup, config = run.setup, run.setup.config.train
    labels = labels.to(setup.runtime.device)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(run.step, setup.num_steps, config)
    with setup.runtime.autocast():
        logits = run.model(setup.runtime.place(images))
    loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.step += 1
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()
