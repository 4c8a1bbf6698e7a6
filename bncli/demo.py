"""A trained network whose running statistics are ruined on purpose: is it noticed, and is it repaired?

Four accidents that happen to people. Each starts from the same checkpoint; its weights are only touched by
averaging. What `bncli eval --gap` and `bncli recalibrate` make of it is measured on the real images.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bncli.batchnorm import batch_norm_layers, batch_statistics_mode
from bncli.checkpoints import Checkpoint, load_model, save_checkpoint
from bncli.config import Config, ConvNetConfig
from bncli.data import BatchPlan, Dataset, sample_batches, training_batches
from bncli.evaluation import Gap, measure_gap
from bncli.evaluation.gap import PhaseProgress
from bncli.hardware import describe_machine
from bncli.runtime import Runtime
from bncli.training import training_sample
from bncli.training.losses import loss_and_logits
from bncli.training.optimizer import build_optimizer
from bncli.training.run import unconfigured_layers

SHORT_MOMENTUM, NUM_SHORT_STEPS = 0.001, 20
NUM_PAIR_STEPS = 50
NUM_CONTINUATIONS, NUM_CONTINUED_STEPS = 3, 15


@dataclass(frozen=True)
class Ruin:
    """One accident, and what was made of it."""

    name: str
    what: str
    ruined_layer: str | None  # where only one was ruined
    gap: Gap  # `running` is the ruined network, `precise` and `exact` the repaired one
    saved: str | None  # the ruined checkpoint's file


@dataclass(frozen=True)
class Demonstration:
    """The network as it is, and after each accident."""

    checkpoint: str | None  # its file; None: trained for this, and not kept
    dataset: str
    num_test_images: int
    num_calibration_images: int
    intact: Gap
    ruins: tuple[Ruin, ...]
    runtime: dict[str, Any]
    machine: dict[str, Any]


@dataclass(frozen=True)
class _Scene:
    """What every accident and every measurement needs."""

    checkpoint: Checkpoint
    config: Config
    dataset: Dataset
    runtime: Runtime
    num_images: int
    progress: PhaseProgress

    def fresh_model(self) -> nn.Module:
        """The trained network, in eval mode."""
        return self.runtime.place_model(load_model(self.checkpoint))

    def gap_of(self, model: nn.Module) -> Gap:
        """What `bncli eval --gap` says."""
        test, size = self.dataset.test, max(2, self.config.runtime.eval_batch_size)
        place = self.runtime.place
        with self.runtime.autocast():
            return measure_gap(
                model,
                lambda: ((place(images), labels) for images, labels in sample_batches(test, size, len(test))),
                training_sample(self.dataset.train, self.runtime, size, self.num_images),
                progress=self.progress,
            )


def demonstrate(
    path: Path | None,
    checkpoint: Checkpoint,
    config: Config,
    dataset: Dataset,
    runtime: Runtime,
    *,
    num_images: int = 5_000,
    save_dir: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
    progress: PhaseProgress = lambda phase, done, total: None,
) -> Demonstration:
    """Ruin copies of the checkpoint's network and take the gap of each apart; `checkpoint` is unchanged.

    `num_images` training images give the population statistics. With `save_dir` the ruined checkpoints are
    written there, and so is `checkpoint` itself, as intact.pt, unless it has a file at `path` already.

    Raises BncliError if the network has no running statistics, OSError where nothing can be written.
    """
    scene = _Scene(checkpoint, config, dataset, runtime, num_images, progress)
    if path is None and save_dir is not None:
        path = save_dir / "intact.pt"
        save_checkpoint(checkpoint, path)
    report("the network as it is")
    intact = scene.gap_of(scene.fresh_model())
    ruins = []
    for name, what, ruin in (
        (
            "short_average",
            f"momentum {SHORT_MOMENTUM:g}, {NUM_SHORT_STEPS} steps from the start (0, 1)",
            _short_average,
        ),
        ("batches_of_2", f"statistics of {NUM_PAIR_STEPS} batches of 2 images", _batches_of_2),
        (
            "averaged_weights",
            f"weights averaged over {NUM_CONTINUATIONS} continuations of {NUM_CONTINUED_STEPS} steps",
            _averaged_weights,
        ),
        ("one_layer_reset", "one layer's statistics reset to 0 and 1", _one_layer_reset),
    ):
        report(what)
        model = scene.fresh_model()
        layer = ruin(model, scene)
        gap = scene.gap_of(model)
        saved = None if save_dir is None else save_dir / f"{name}.pt"
        if saved is not None:
            save_checkpoint(_ruined(checkpoint, model, gap), saved)
        ruins.append(Ruin(name, what, layer, gap, None if saved is None else str(saved)))
    return Demonstration(
        checkpoint=None if path is None else str(path),
        dataset=dataset.name,
        num_test_images=len(dataset.test),
        num_calibration_images=intact.num_calibration_images,
        intact=intact,
        ruins=tuple(ruins),
        runtime=runtime.describe(),
        machine=describe_machine(),
    )


def _short_average(model: nn.Module, scene: _Scene) -> None:
    """An exponential average that has hardly left its start."""
    size = scene.config.train.batch_size
    _track(model, _images(scene, size), SHORT_MOMENTUM, NUM_SHORT_STEPS, scene.runtime)


def _batches_of_2(model: nn.Module, scene: _Scene) -> None:
    """What is left where memory allows for two images at a time."""
    _track(model, _images(scene, 2), 0.1, NUM_PAIR_STEPS, scene.runtime)


def _averaged_weights(model: nn.Module, scene: _Scene) -> None:
    """The weights' mean over several runs on from here; the running statistics stay those from before."""
    sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for seed in range(NUM_CONTINUATIONS):
        continued = copy.deepcopy(model)
        _train_on(continued, scene, seed)
        for total, parameter in zip(sums, continued.parameters(), strict=True):
            total.add_(parameter.detach(), alpha=1 / NUM_CONTINUATIONS)
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), sums, strict=True):
            parameter.copy_(mean)


def _one_layer_reset(model: nn.Module, scene: _Scene) -> str:
    """A layer in the middle that was lost on loading, say."""
    layers = batch_norm_layers(model)
    name, layer = layers[len(layers) // 2]
    layer.reset_running_stats()
    return name


def _track(
    model: nn.Module, batches: Iterable[Tensor], momentum: float, num_steps: int, runtime: Runtime
) -> None:
    """Start the running statistics anew and let them follow batches."""
    for _, layer in batch_norm_layers(model):
        layer.reset_running_stats()
        layer.momentum = momentum
    with batch_statistics_mode(model), torch.no_grad(), runtime.autocast():
        for images in islice(batches, num_steps):
            model(images)


def _images(scene: _Scene, batch_size: int) -> Iterator[Tensor]:
    """Training images without end, however few there are."""
    train = scene.dataset.train
    while True:
        for images, _ in sample_batches(train, batch_size, len(train)):
            yield scene.runtime.place(images)


def _train_on(model: nn.Module, scene: _Scene, seed: int) -> None:
    """A few steps at the configuration's highest learning rate."""
    config, train, runtime = scene.config, scene.dataset.train, scene.runtime
    optimizer = build_optimizer(model, config.train)
    augment = config.augment.at_full_size()  # as at the end of training
    plan = BatchPlan(len(train), config.train.batch_size, "keep", min_batch=min(2, config.train.batch_size))
    epochs = (
        training_batches(
            train, plan, augment, seed=seed, epoch=epoch, fill=scene.checkpoint.mean
        )
        for epoch in count()
    )  # fmt: skip
    model.train()
    for images, labels in islice(chain.from_iterable(epochs), NUM_CONTINUED_STEPS):
        with runtime.autocast():
            outputs = model(runtime.place(images))
        loss, _ = loss_and_logits(outputs, labels.to(runtime.device), config.train.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _ruined(checkpoint: Checkpoint, model: nn.Module, gap: Gap) -> Checkpoint:
    """A checkpoint of the ruined network; its configuration tells the momentum that it was ruined with."""
    config = checkpoint.config
    network = config.model
    if isinstance(network, ConvNetConfig):
        momentum = batch_norm_layers(model)[0][1].momentum
        batch_norm = network.batch_norm.model_copy(update={"momentum": momentum})
        network = network.model_copy(update={"batch_norm": batch_norm})
    return replace(
        checkpoint.finished(),
        config=config.model_copy(update={"model": network}),
        batch_norm_layers=unconfigured_layers(config, model),
        state_dict={key: value.cpu() for key, value in model.state_dict().items()},
        test_accuracy=gap.running.accuracy,
        test_loss=gap.running.loss,
        recalibration=None,  # what was measured is ruined
    )
