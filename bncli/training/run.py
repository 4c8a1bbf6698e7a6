"""The state of a run: what a checkpoint saves and a resumed run restores."""

from dataclasses import dataclass
from pathlib import Path

import torch

from bncli.checkpoint import Checkpoint, load_checkpoint
from bncli.config import Config
from bncli.data import sequential_batches
from bncli.errors import CheckpointError, RunError
from bncli.evaluation import Evaluation, evaluate
from bncli.model import ConvNet
from bncli.runtime import describe_machine
from bncli.training.optimizer import build_optimizer
from bncli.training.run_dir import find_config
from bncli.training.setup import Setup

# what may change when a run is resumed: where the data lies, how it is computed, how long it goes on
CHANGEABLE = ("data.root", "data.url", "data.archive", "data.cache", "runtime.", "train.epochs")


@dataclass
class Run:
    """A network on its way: everything that changes while it is trained."""

    setup: Setup
    model: ConvNet
    optimizer: torch.optim.SGD
    epoch: int = 0  # epochs finished
    step: int = 0  # training steps finished
    best_accuracy: float = 0.0  # on the test split, of all epochs, as a fraction
    seconds: float = 0.0  # of training, evaluation and checkpoints, over all sessions

    @classmethod
    def start(cls, setup: Setup) -> "Run":
        """A run before its first step."""
        return cls(setup, setup.model, build_optimizer(setup.model, setup.config.train))

    @classmethod
    def restore(cls, setup: Setup, last: Checkpoint) -> "Run":
        """The run as it was when it saved `last`.

        Raises:
            CheckpointError: when the checkpoint does not fit the network or its training data.
        """
        run = cls.start(setup)
        if (last.mean, last.std) != (setup.normalization.mean, setup.normalization.std):
            raise CheckpointError(
                f"cannot resume: the training images are not those of the checkpoint (pixel means"
                f" {setup.normalization.mean}, were {last.mean}); check data.root"
            )
        try:
            run.model.load_state_dict(last.state_dict)
            run.optimizer.load_state_dict(last.optimizer or {})
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"cannot resume: the checkpoint does not fit: {reason}") from None
        run.epoch, run.step = last.epoch, last.step
        run.best_accuracy, run.seconds = last.best_accuracy, last.seconds
        return run

    @property
    def learning_rate(self) -> float:
        """Of the step taken last."""
        return float(self.optimizer.param_groups[0]["lr"])

    def evaluate(self) -> Evaluation:
        """Accuracy and loss on the test split, in eval mode."""
        runtime = self.setup.runtime
        batches = sequential_batches(self.setup.dataset.test, self.setup.config.runtime.eval_batch_size)
        with runtime.autocast():
            return evaluate(self.model, ((runtime.place(images), labels) for images, labels in batches))

    def checkpoint(self, evaluation: Evaluation) -> Checkpoint:
        """The run as it is now; `evaluation` is of its present weights."""
        return Checkpoint(
            config=self.setup.config,
            state_dict={key: value.cpu() for key, value in self.model.state_dict().items()},
            mean=self.setup.normalization.mean,
            std=self.setup.normalization.std,
            class_names=self.setup.dataset.class_names,
            image_size=self.setup.image_shape[-1],
            epoch=self.epoch,
            step=self.step,
            test_accuracy=evaluation.accuracy,
            test_loss=evaluation.loss,
            best_accuracy=self.best_accuracy,
            seconds=self.seconds,
            runtime=self.setup.runtime.describe(),
            machine=describe_machine(),
            optimizer=self.optimizer.state_dict(),
        )


def load_last(run_dir: Path, config: Config) -> Checkpoint | None:
    """The checkpoint to resume from; None for a run that was interrupted in its first epoch.

    Raises:
        RunError: when there is no run in the directory, or its configuration was another one.
        CheckpointError: when the checkpoint cannot be read.
    """
    find_config(run_dir)
    if not (run_dir / "last.pt").exists():
        return None
    last = load_checkpoint(run_dir / "last.pt")
    differences = _differences(last.config.model_dump(), config.model_dump())
    refused = [text for key, text in differences.items() if not key.startswith(CHANGEABLE)]
    if refused:
        raise RunError(f"{run_dir}: cannot resume with another configuration: {'; '.join(refused)}")
    return last


def _differences(before: object, after: object, key: str = "") -> dict[str, str]:
    """Dotted keys whose values differ, each with a text that shows both."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, str] = {}
        for name in before | after:
            found |= _differences(before.get(name), after.get(name), f"{key}.{name}".lstrip("."))
        return found
    return {} if before == after else {key: f"{key} was {before!r}, now {after!r}"}
