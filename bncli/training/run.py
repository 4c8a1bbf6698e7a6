"""The state of a run: what a checkpoint saves and a resumed run restores."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bncli.batchnorm import batch_norm_layers, has_running_statistics
from bncli.checkpoints import Checkpoint
from bncli.config import Config, ConvNetConfig
from bncli.data import sequential_batches, training_batches
from bncli.distributed import synchronized
from bncli.errors import CheckpointError, RunError, StoppedError
from bncli.evaluation import Evaluation, evaluate
from bncli.hardware import describe_machine
from bncli.runtime import keep_freed_memory, map_large_blocks, release_freed_memory
from bncli.training.average import (
    AveragedWeights,
    averaged_network,
    describe_measurement,
)
from bncli.training.network_randomness import network_randomness
from bncli.training.optimizer import Optimizer, build_optimizer, schedule_at
from bncli.training.patch_convolution import use_patches
from bncli.training.pooling import pool_before_relu
from bncli.training.running_epoch import RunningEpoch
from bncli.training.setup import Setup, synchronizes
from bncli.training.share import Share
from bncli.training.team import Team
from bncli.training.weight_gradient import layers_by_patches
from bncli.wording import plural

_BY_PATCHES = "weight_gradient_by_patches"  # in a checkpoint's `runtime`: names of layers


@dataclass
class Run:
    """A network on its way: everything that changes while it is trained."""

    setup: Setup
    model: nn.Module
    forward: Callable[[Tensor], Any]  # the model in a training step: itself, or compiled
    optimizer: Optimizer
    running_epoch: RunningEpoch
    average: AveragedWeights | None  # of the weights, where configured
    team: Team | None = None  # of the processes that take its steps together
    by_patches: tuple[str, ...] = ()  # the convolutions whose weights' gradients are products of patches
    epoch: int = 0  # epochs finished
    step: int = 0  # training steps finished
    best_accuracy: float = 0.0  # on the test split, of all epochs, as a fraction
    seconds: float = 0.0  # of training, evaluation and checkpoints, over all sessions
    saved_step: int = -1  # the step that last.pt holds
    former_threads: int | None = None  # that the resumed run had, where it is recorded
    former_processes: int | None = None  # that it had
    changes: tuple[str, ...] = ()  # what it computed otherwise, so that its numbers round differently now
    # False while a step or the end of an epoch is under way, when saving would save half of it
    is_whole: bool = True
    keeps_memory: bool = False  # whether the process keeps what it frees by now, see `settle_memory`
    last_tick: float = field(default_factory=time.perf_counter)

    @classmethod
    def start(
        cls,
        setup: Setup,
        stop: Callable[[], bool] = lambda: False,
        *,
        by_patches: tuple[str, ...] | None = None,
    ) -> "Run":
        """A run before its first step; several processes tell each other what `stop` says.

        `by_patches` are the convolutions of a run that is resumed, see `layers_by_patches`.

        Raises:
            ValueError: they are not those of this network.
        """
        if setup.reuses_memory:
            map_large_blocks()
        optimizer = build_optimizer(setup.model, setup.config.train)
        forward: Callable[[Tensor], Any] = setup.model
        if setup.runtime.device.type == "cpu" and not setup.runtime.compiles:
            pool_before_relu(setup.model)
        by_patches = layers_by_patches(setup, by_patches)
        use_patches(setup.model, by_patches)
        if setup.runtime.compiles:
            # for each size of images anew: a network for any size is slower
            forward = torch.compile(setup.model, dynamic=False)
        average = None
        if setup.config.train.ema_epochs is not None:
            average = AveragedWeights(setup.model, setup.config.train.ema_epochs * setup.plan.num_steps)
        epoch = RunningEpoch(setup.model, setup.runtime.device)
        team = None
        if setup.processes is not None:
            team = Team(setup.processes, setup.model, stop, sync=synchronizes(setup.config))
        return cls(setup, setup.model, forward, optimizer, epoch, average, team, by_patches)

    @classmethod
    def restore(cls, setup: Setup, last: Checkpoint, stop: Callable[[], bool] = lambda: False) -> "Run":
        """The run as it was when it saved `last`.

        Raises:
            CheckpointError: when the checkpoint does not fit the network.
            RunError: when the data are not those of the checkpoint.
        """
        try:
            run = cls.start(setup, stop, by_patches=tuple(last.runtime.get(_BY_PATCHES, ())))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"cannot resume: the checkpoint does not fit: {error}") from None
        if last.data_digest not in {None, setup.data_digest}:
            raise RunError(
                f"cannot resume: the images or labels are not those of the checkpoint (SHA-256 was"
                f" {last.data_digest}, now {setup.data_digest}); check data.root"
            )
        if (last.mean, last.std) != (setup.normalization.mean, setup.normalization.std):
            raise RunError(
                f"cannot resume: the training images are not those of the checkpoint (pixel means were"
                f" {last.mean}, now {setup.normalization.mean}); check data.root"
            )
        try:
            trained = last.averaging or {"last": last.state_dict}
            run.model.load_state_dict(trained["last"])
            if run.average is not None:
                run.average.load_state_dict(trained["average"])
            run.optimizer.load_momenta(last.optimizer or {})
            run.running_epoch = RunningEpoch(run.model, setup.runtime.device)
            if last.running_epoch is not None:
                run.running_epoch.load_state_dict(last.running_epoch)
            if last.step != last.epoch * setup.plan.num_steps + run.running_epoch.num_steps:
                raise ValueError(f"step {last.step} is not in epoch {last.epoch + 1}")
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"cannot resume: the checkpoint does not fit: {reason}") from None
        run.epoch, run.step, run.saved_step = last.epoch, last.step, last.step
        run.best_accuracy, run.seconds = last.best_accuracy, last.seconds
        run.changes = _changes(last.runtime, run.describe_runtime())
        if run.step > 0:  # a run that is resumed after its last step saves this rate once more
            run.set_learning_rate(run.step - 1)
        return run

    def set_learning_rate(self, step: int) -> None:
        """That of step `step`, from 0."""
        share = schedule_at(step, self.setup.num_steps, self.setup.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share

    @property
    def learning_rate(self) -> float:
        """Of the step taken last, of the convolutions."""
        return float(self.optimizer.param_groups[0]["lr"])

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that are left of the running epoch."""
        config = self.setup.config
        return training_batches(
            self.setup.train_split,
            self.setup.plan,
            config.augment,
            seed=config.train.seed,
            epoch=self.epoch,
            fill=self.setup.normalization.mean,
            start_step=self.running_epoch.num_steps,
            rows_of=lambda batch_size: self.setup.share_of(batch_size).rows,
        )

    def share_in(self, labels: Tensor) -> Share:
        """What this process computes of the next step, by its own labels (B,)."""
        if self.team is None:
            return self.setup.share_of(len(labels))
        return self.setup.share_of(self.setup.plan.batch_sizes[self.running_epoch.num_steps])

    def network_randomness(self, part: int) -> AbstractContextManager[None]:
        """The context of a part of the next step: what the network draws in it depends on both alone."""
        seed, step = self.setup.config.train.seed, self.running_epoch.num_steps
        return network_randomness(self.setup.runtime.device, seed, self.epoch, step, part)

    def synchronized(self) -> AbstractContextManager[None]:
        """The context in which BatchNorm normalises by the whole batch of all processes, where configured."""
        if self.team is None or not self.team.sync or self.setup.runtime.device.type == "cuda":
            return nullcontext()
        return synchronized(self.model, self.team.processes)

    def settle_memory(self) -> None:
        """Keep freed memory from the end of the first step on, where configured.

        Not before: what preparing the data took for a moment would be kept, and fit no activation; and what
        the first step allocates for good, such as momenta, would lie between the activations.
        """
        if self.setup.reuses_memory and not self.keeps_memory:
            keep_freed_memory()
            release_freed_memory()
            self.keeps_memory = True

    def stops(self, stop: Callable[[], bool]) -> bool:
        """Whether to stop after the step taken last: of several processes all do, or none."""
        return stop() if self.team is None else self.team.stops

    def network_to_use(self, stop: Callable[[], bool]) -> nn.Module:
        """The one that is evaluated and saved: as the last step left it, or with averaged weights.

        Raises:
            StoppedError, DivergedError: see `averaged_network`.
        """
        if self.average is None:
            return self.model
        return averaged_network(self.setup, self.average, self.model, stop)

    def evaluate(self, network: nn.Module, stop: Callable[[], bool]) -> Evaluation:
        """Accuracy and loss of `network` on the test split, in eval mode.

        Raises:
            StoppedError: when `stop`, which is asked before every batch, says so.
        """
        runtime, ranks, test = self.setup.runtime, self.setup.ranks, self.setup.dataset.test
        size = self.setup.config.runtime.eval_batch_size

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in sequential_batches(test, size, rank=ranks.rank, num_ranks=ranks.size):
                if stop():
                    raise StoppedError
                yield runtime.place(images), labels

        with runtime.autocast():
            return evaluate(network, batches(), group=ranks.group)

    def end_epoch(self, evaluation: Evaluation | None) -> bool:
        """Count the epoch, and begin the next one; whether it was evaluated, and the best so far."""
        is_first = self.epoch < self.setup.config.train.evaluate_every
        is_best = evaluation is not None and (is_first or evaluation.accuracy > self.best_accuracy)
        if evaluation is not None:
            self.best_accuracy = max(self.best_accuracy, evaluation.accuracy)
        self.tick()
        self.epoch += 1
        self.running_epoch = RunningEpoch(self.model, self.setup.runtime.device)
        if self.setup.reuses_memory:
            # gaps between tensors grow from step to step: speedrun.yaml with 4 steps in each of 4 epochs took
            # 985 MiB in place of 1,035
            release_freed_memory()
        return is_best

    def tick(self) -> None:
        """Add the time since the last tick to the run and to its running epoch."""
        now = time.perf_counter()
        self.seconds += now - self.last_tick
        self.running_epoch.seconds += now - self.last_tick
        self.last_tick = now

    def describe_runtime(self) -> dict[str, Any]:
        """How this run computes: plain values."""
        by_patches = {_BY_PATCHES: list(self.by_patches)} if self.by_patches else {}
        return self.setup.runtime.describe_training() | by_patches

    def checkpoint(self, network: nn.Module, evaluation: Evaluation | None) -> Checkpoint:
        """The run as it is now, and the network to use, which is the one that `evaluation` is of, if any."""
        self.tick()
        last, averaging, recalibration = _on_cpu(self.model.state_dict()), None, None
        if network is not self.model and has_running_statistics(network):
            recalibration = describe_measurement(self.setup, network)
        if self.average is not None:
            averaging = {"last": last, "average": _on_cpu(self.average.state_dict())}
        return Checkpoint(
            config=self.setup.config,
            state_dict=last if network is self.model else _on_cpu(network.state_dict()),
            mean=self.setup.normalization.mean,
            std=self.setup.normalization.std,
            class_names=self.setup.dataset.class_names,
            image_size=self.setup.image_shape[-1],
            epoch=self.epoch,
            step=self.step,
            test_accuracy=evaluation.accuracy if evaluation else None,
            test_loss=evaluation.loss if evaluation else None,
            best_accuracy=self.best_accuracy,
            seconds=self.seconds,
            runtime=self.describe_runtime(),
            machine=describe_machine(),
            optimizer=self.optimizer.state_dict(),
            running_epoch=None if evaluation else self.running_epoch.state_dict(),
            data_digest=self.setup.data_digest,
            recalibration=recalibration,
            averaging=averaging,
            batch_norm_layers=unconfigured_layers(self.setup.config, self.model),
            may_import=True,  # what this process was told to
        )


def _changes(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    """In words, what makes numbers round differently; threads and processes are reported by themselves."""
    found = [
        f"{key.replace('_', ' ')} {now[key]}, {before[key]} before"
        for key in ("device", "precision", "memory_format", "compile")
        if key in before and before[key] != now[key]
    ]
    layers, former = (runtime.get(_BY_PATCHES, []) for runtime in (now, before))
    if layers != former:
        found.append(
            f"weight gradient by patches in {plural(len(layers), 'layer')}, in {len(former)} before"
            if len(layers) != len(former)
            else f"weight gradient by patches in other layers ({', '.join(layers)})"
        )
    return tuple(found)


def unconfigured_layers(config: Config, model: nn.Module) -> dict[str, dict[str, float | None]] | None:
    """What a checkpoint records of BatchNorm layers; None where the configuration tells it."""
    if isinstance(config.model, ConvNetConfig):
        return None
    return {name: {"eps": layer.eps, "momentum": layer.momentum} for name, layer in batch_norm_layers(model)}


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.cpu() for key, value in state.items()}
