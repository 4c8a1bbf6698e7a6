"""Everything a run decides before its first step: data, network, batches, device.

Training images to measure statistics on begin here too.

`bncli train --dry-run` shows it as numbers.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bncli.batchnorm import has_running_statistics
from bncli.checkpoints import Checkpoint, load_checkpoint
from bncli.config import Config, ConvNetConfig, ImageFolderConfig
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
from bncli.distributed import ALONE, Processes, Ranks
from bncli.errors import ConfigError
from bncli.indexed import Indexed, pick
from bncli.models.configured import build_configured
from bncli.models.convnet import ConvNet, LayerCost, measure_layers, smallest_map
from bncli.models.named import check_network_name
from bncli.runtime import Runtime, check_compiler, resolve_runtime
from bncli.training.fitness import check_network
from bncli.training.share import Share, share_of
from bncli.training.shared_data import load_once
from bncli.wording import plural

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
    processes: Processes | None = None  # that take the steps together; None: this one alone

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run."""
        return self.processes is None or self.processes.is_main

    @property
    def ranks(self) -> Ranks:
        """The same processes for what is measured on images."""
        return ALONE if self.processes is None else self.processes.ranks

    def loaded(self, path: Path) -> Checkpoint:
        """A checkpoint of this run, to be used only; rank 0 alone, which wrote it, reads the file."""
        processes = self.processes
        found = load_checkpoint(path, model=self.config.model.name).finished() if self.is_main else None
        if processes is not None:
            found = processes.from_main(found)
        assert found is not None
        return found

    def share_of(self, batch_size: int) -> Share:
        """What this process computes of a batch."""
        if self.processes is None:
            return share_of(batch_size, self.num_parts(batch_size))
        return share_of(batch_size, self.num_parts(batch_size), self.processes.rank, self.processes.num_ranks)

    def num_parts(self, batch_size: int) -> int:
        """Into how many parts a batch is cut to be computed."""
        if self.processes is not None and synchronizes(self.config):
            return self.processes.num_ranks
        return num_micro_batches(batch_size, self.config.train.micro_batch_size)

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
    processes: Processes | None = None,
) -> Setup:
    """Load the data, build the network and decide the size of every batch.

    Without `may_download` data are only fetched from a `data.url` that is configured. `default_threads` holds
    where the configuration names no number of threads. `processes` are those that train together; all of them
    call this, and begin with the same weights.

    Raises:
        BncliError: when the run could not be carried out as configured.
    """
    if isinstance(config.model, ConvNetConfig):
        _check_statistics(config, config.model)
    else:  # before images are loaded, which may take minutes
        check_network_name(config.model.name, config.model.arguments)
    check_sync(config)
    runtime = resolve_runtime(config.runtime, default_threads=default_threads)
    if processes is not None:
        runtime = replace(runtime, device=processes.device, processes=processes.num_ranks)
    if runtime.compiles:
        check_compiler(runtime.device)

    def load() -> Dataset:
        return load_dataset(config.data, progress=progress, may_download=may_download)

    if processes is None:
        dataset = load()
    else:
        dataset = load_once(load, processes, in_memory=not isinstance(config.data, ImageFolderConfig))
    dataset = for_training(dataset)
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
        keep_helpers=True,
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
    if processes is not None:
        check_shares(config, plan, processes.num_ranks)
        processes.copy_from_main([*model.parameters(), *model.buffers()])
        if synchronizes(config) and runtime.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return Setup(config, runtime, dataset, normalization, plan, model, processes)


def synchronizes(config: Config) -> bool:
    """Whether BatchNorm is to normalise by the whole batch of several processes."""
    return isinstance(config.model, ConvNetConfig) and config.model.batch_norm.sync


def check_sync(config: Config) -> None:
    """Raise ConfigError where layers are to normalise by the whole batch, and it is cut into parts."""
    if not synchronizes(config):
        return
    if config.train.micro_batch_size is not None:
        problem = "model.batch_norm.sync: normalises the whole batch together, without train.micro_batch_size"
        raise ConfigError("model", [f"{problem}; set one of them to false or null"])
    if config.runtime.compile:
        raise ConfigError(
            "model", ["model.batch_norm.sync: cannot be compiled; set runtime.compile to false"]
        )


def check_shares(config: Config, plan: BatchPlan, num_ranks: int) -> None:
    """Raise ConfigError where one of several processes would have nothing to compute."""
    size = config.train.micro_batch_size
    if synchronizes(config):
        smallest = min(plan.batch_sizes)
        if smallest < num_ranks:
            problem = (
                f"train.batch_size: a batch of {plural(smallest, 'image')} leaves a process without data"
            )
            raise ConfigError("train", [f"{problem}; start at most {smallest} processes"])
        return
    fitting = plan.batch_size // num_ranks
    if num_micro_batches(plan.batch_size, size) >= num_ranks:
        return
    if fitting < plan.min_batch:
        problem = f"train.batch_size: {plan.batch_size} is too small for {num_ranks} processes"
        raise ConfigError("train", [f"{problem}; start fewer"])
    parts = f"{'null' if size is None else size} leaves a process without data"
    raise ConfigError(
        "train",
        [
            f"train.micro_batch_size: {parts}: {num_ranks} processes share the parts of a batch of"
            f" {plan.batch_size}; set it to at most {fitting}"
        ],
    )


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


def training_sample(
    split: Indexed, runtime: Runtime, batch_size: int, num_images: int, ranks: Ranks = ALONE
) -> "Batches":
    """Images of the split on the device, as often as a measurement wants to go through them.

    Of several ranks each has every batch that is dealt to it.
    """
    return lambda: (
        runtime.place(images)
        for images, _ in sample_batches(split, batch_size, num_images, rank=ranks.rank, num_ranks=ranks.size)
    )


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
