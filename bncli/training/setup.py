"""Everything a run decides before its first step: data, network, batches, device.

Training images to measure statistics on begin here too.

`bncli train --dry-run` shows it as numbers.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bncli.batchnorm import has_running_statistics
from bncli.config import Config, ConvNetConfig
from bncli.data import (
    BatchPlan,
    Dataset,
    Normalization,
    Progress,
    Split,
    check_augmentation,
    chosen_normalization,
    digest_dataset,
    for_training,
    load_dataset,
    num_micro_batches,
    sample_batches,
)
from bncli.errors import ConfigError
from bncli.indexed import Indexed, pick
from bncli.models.configured import build_configured
from bncli.models.convnet import ConvNet, LayerCost, measure_layers, smallest_map
from bncli.runtime import Runtime, check_compiler, resolve_runtime
from bncli.training.fitness import check_network

if TYPE_CHECKING:
    from bncli.batches import Batches

STEPS_BETWEEN_CHECKS = 100  # on a GPU; as many are taken once more, one by one, to find the first bad one
NUM_WHITENING_IMAGES = 1_000  # a million 2x2 patches at 32x32; more only take memory


@dataclass(frozen=True, eq=False)
class Setup:
    """A run that is ready to start."""

    config: Config
    runtime: Runtime
    dataset: Dataset
    normalization: Normalization
    plan: BatchPlan
    model: nn.Module

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of one image: (channels, height, width)."""
        channels, height, width = self.dataset.train.image_shape
        return channels, height, width

    @cached_property
    def train_split(self) -> Indexed:
        """The training images where batches are made: on a GPU that has room for them, else as loaded."""
        train, device = self.dataset.train, self.runtime.device
        if not isinstance(train, Split) or not self.runtime.has_room(train.images.nbytes):
            return train
        return Split(train.images.to(device), train.labels.to(device))

    @property
    def steps_between_checks(self) -> int:
        """After how many steps to look for NaN and infinity: a GPU has to be waited for, a CPU has not."""
        return 1 if self.runtime.device.type == "cpu" else STEPS_BETWEEN_CHECKS

    @cached_property
    def data_digest(self) -> str:
        """SHA-256 of the images and labels."""
        return digest_dataset(self.dataset)

    @property
    def reuses_memory(self) -> bool:
        """Whether the process keeps what it frees, as configured."""
        return self.config.runtime.reuse_memory and self.runtime.device.type == "cpu"

    @property
    def norm_batch_size(self) -> int:
        """Images that BatchNorm normalises together in training."""
        return self.config.train.micro_batch_size or self.config.train.batch_size

    @property
    def num_steps(self) -> int:
        """Training steps of all epochs together."""
        return self.plan.num_steps * self.config.train.epochs


def prepare(
    config: Config,
    *,
    progress: Progress | None = None,
    may_download: bool = True,
    default_threads: int | None = None,
) -> Setup:
    """Load the data, build the network and decide the size of every batch.

    Without `may_download` data are only fetched from a `data.url` that is configured. `default_threads` holds
    where the configuration names no number of threads.

    Raises:
        BncliError: when the run could not be carried out as configured.
    """
    if isinstance(config.model, ConvNetConfig):
        _check_statistics(config, config.model)
    runtime = resolve_runtime(config.runtime, default_threads=default_threads)
    if runtime.compiles:
        check_compiler(runtime.device)
    dataset = for_training(load_dataset(config.data, progress=progress, may_download=may_download))
    normalization = chosen_normalization(config.data.normalization, dataset.train)
    assert normalization is not None  # of uint8 images
    channels, height, width = dataset.train.image_shape
    check_augmentation(config.augment, height, width)
    # the network and its batches must fit the smallest images
    height, width = config.augment.smallest_size(height, width)
    model = build_configured(
        config.model,
        len(dataset.class_names),
        image_size=min(height, width),
        mean=normalization.mean,
        std=normalization.std,
        seed=config.train.seed,
    )
    if isinstance(config.model, ConvNetConfig):
        assert isinstance(model, ConvNet)
        _fit_whitening(model, dataset.train)
    else:
        # the pixels do not matter, so the smallest size need not be made as training makes it
        ends = pick(dataset.train, torch.tensor([0, len(dataset.train) - 1]))
        images = nn.functional.interpolate(ends, (height, width))
        check_network(model, config.model.name, images, len(dataset.class_names))
        if config.train.recalibrate != "none" and not has_running_statistics(model):
            problem = f"train.recalibrate: {config.model.name} has no running statistics; set it to none"
            raise ConfigError("train", [problem])
    # BatchNorm in train mode needs more than one value per channel: "Expected more than 1 value per
    # channel" would otherwise stop a run at the last batch of its first epoch
    min_batch = 2 if smallest_map(model, (channels, height, width)) == 1 else 1
    plan = BatchPlan(
        num_images=len(dataset.train),
        batch_size=config.train.batch_size,
        last_batch=config.train.last_batch,
        min_batch=min_batch,
    )
    _check_micro_batches(plan, config.train.micro_batch_size)
    model = runtime.place_model(model)
    return Setup(config, runtime, dataset, normalization, plan, model)


def _fit_whitening(model: ConvNet, train: Indexed) -> None:
    if model.whiten is None:
        return
    # evenly spaced to the very end, because an image folder comes sorted by class
    num_images = min(NUM_WHITENING_IMAGES, len(train))
    spaced = torch.arange(num_images) * len(train) // num_images
    model.whiten.fit(model.normalize(pick(train, spaced)))


def _check_statistics(config: Config, model: ConvNetConfig) -> None:
    """Raise ConfigError where running statistics are to be replaced and there are none."""
    if model.batch_norm.track_running_stats:
        return
    train = config.train
    problems = []
    if train.recalibrate != "none":
        problems.append(
            f"train.recalibrate: {train.recalibrate!r} needs running statistics to replace; set it to none"
        )
    if train.ema_epochs is not None:
        problems.append(
            f"train.ema_epochs: {train.ema_epochs:g} needs running statistics to measure; set it to null"
        )
    if problems:
        fix = "or model.batch_norm.track_running_stats to true"
        raise ConfigError("train", [f"{problem}, {fix}" for problem in problems])


def _check_micro_batches(plan: BatchPlan, size: int | None) -> None:
    """Raise ConfigError where a part of a batch would be too small for BatchNorm, as a batch must not be."""
    smallest = min(batch // num_micro_batches(batch, size) for batch in plan.batch_sizes)
    if smallest < plan.min_batch:
        reason = f"{size} leaves BatchNorm one value per channel in a part of a batch"
        raise ConfigError("train", [f"train.micro_batch_size: {reason}; set it to null or a larger number"])


def training_sample(split: Indexed, runtime: Runtime, batch_size: int, num_images: int) -> "Batches":
    """Images of the split on the device, as often as a measurement wants to go through them."""
    return lambda: (runtime.place(images) for images, _ in sample_batches(split, batch_size, num_images))


@dataclass(frozen=True)
class SetupDescription:
    """A run, described before its first step."""

    config: Config
    runtime: dict[str, Any]
    dataset: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # (channels, height, width)
    num_train_images: int
    num_test_images: int
    normalization: Normalization
    layers: tuple[LayerCost, ...]
    num_parameters: int
    flops_per_image: int  # of a forward pass; a multiplication and an addition count as two
    steps_per_epoch: int
    num_steps: int
    batch_size: int
    last_batch_size: int
    images_left_out_per_epoch: int


def describe_setup(setup: Setup) -> SetupDescription:
    """Everything that is decided before the first step, as numbers."""
    layers, flops = measure_layers(setup.model, setup.image_shape)
    num_train_images = len(setup.dataset.train)
    return SetupDescription(
        config=setup.config,
        runtime=setup.runtime.describe_training(),
        dataset=setup.dataset.name,
        class_names=setup.dataset.class_names,
        image_shape=setup.image_shape,
        num_train_images=num_train_images,
        num_test_images=len(setup.dataset.test),
        normalization=setup.normalization,
        layers=layers,
        num_parameters=sum(weight.numel() for weight in setup.model.parameters()),
        flops_per_image=flops,
        steps_per_epoch=setup.plan.num_steps,
        num_steps=setup.num_steps,
        batch_size=setup.plan.batch_size,
        last_batch_size=setup.plan.last_batch_size,
        images_left_out_per_epoch=num_train_images - setup.plan.num_images_per_epoch,
    )
