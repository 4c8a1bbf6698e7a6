"""The figures of `bncli explain communication`, from the networks themselves."""

import re

import pytest
import torch

from bncli.cli.explain.topics import find_topic
from bncli.config import ConvNetConfig
from bncli.config_file import load_config
from bncli.models import build_network
from bncli.models.convnet import build_model

TEXT = " ".join(find_topic("communication").text.split())


def first_bound(
    num_bytes: int, *, batch_size: int, images_per_second: float, gigabits: float, delay: float = 0.0
) -> int:
    """The first number of processes whose ring all-reduce takes longer than their share of a batch."""
    for n in range(2, 10_000):
        compute = batch_size / n / images_per_second
        exchange = 2 * (n - 1) / n * num_bytes * 8 / (gigabits * 1e9) + 2 * (n - 1) * delay
        if exchange > compute:
            return n
    raise AssertionError


def trained_bytes(model: torch.nn.Module) -> int:
    return sum(4 * weight.numel() for weight in model.parameters() if weight.requires_grad)


def test_gradients_of_cifar10_and_when_they_take_longer_than_computing() -> None:
    config = load_config("cifar10")
    assert isinstance(config.model, ConvNetConfig)
    num_bytes = trained_bytes(build_model(config.model, 10, image_size=32))
    assert f"{num_bytes / 1e6:.1f} MB of cifar10" in TEXT
    (found,) = re.findall(r"from (\d+) processes on with cifar10 \(400 images/s each, 1 Gbit/s, 1 ms\)", TEXT)
    bound = first_bound(
        num_bytes, batch_size=config.train.batch_size, images_per_second=400, gigabits=1, delay=1e-3
    )
    assert int(found) == bound


def test_gradients_of_resnet50_and_when_they_take_longer_than_computing() -> None:
    num_bytes = trained_bytes(build_network("torchvision:resnet50"))
    assert f"{num_bytes / 1e6:.0f} MB of ResNet-50" in TEXT
    pattern = r"from (\d+) on with ResNet-50 \(2,500 images/s each, batches of 2,048, 100 Gbit/s\)"
    (found,) = re.findall(pattern, TEXT)
    assert int(found) == first_bound(num_bytes, batch_size=2048, images_per_second=2500, gigabits=100)


def test_a_network_twice_as_fast_lets_more_processes_compute() -> None:
    slow, fast = (
        first_bound(10**7, batch_size=500, images_per_second=400, gigabits=gigabits) for gigabits in (1, 2)
    )
    assert fast == pytest.approx(2 * slow, abs=2)
