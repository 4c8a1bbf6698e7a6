"""What a run would do, for `bncli train --dry-run`."""

from dataclasses import dataclass
from typing import Any

from bncli.config import Config
from bncli.data import Normalization
from bncli.models.convnet import LayerCost, measure_layers
from bncli.training.setup import Setup


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
    layers = measure_layers(setup.model, setup.image_shape)
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
        num_parameters=sum(layer.num_parameters for layer in layers),
        flops_per_image=sum(layer.flops for layer in layers),
        steps_per_epoch=setup.plan.num_steps,
        num_steps=setup.num_steps,
        batch_size=setup.plan.batch_size,
        last_batch_size=setup.plan.last_batch_size,
        images_left_out_per_epoch=num_train_images - setup.plan.num_images_per_epoch,
    )
