"""Pictures, and a training loop that makes statistics worth judging: the networks really learn something."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bncli

P = ParamSpec("P")
T = TypeVar("T")

NUM_CLASSES = 10
AfterStep = Callable[[int, nn.Module], None]


@functools.cache
def pictures(size: int) -> tuple[Tensor, Tensor]:
    """2,000 images (N, 3, size, size) of bncli's embedded data set, normalised, and their labels (N,)."""
    config = bncli.load_config(None, ["data.name=synthetic", "data.num_train=2000", "data.num_test=10"])
    train = bncli.load_dataset(config.data).train
    images = train.images.float() / 255
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    return F.adaptive_avg_pool2d(images, size) if size < 32 else images, train.labels


def batches(size: int, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, in random order."""
    images, labels = pictures(size)
    random = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=random)
        for rows in order.split(batch_size):
            if len(rows) == batch_size:
                yield images[rows], labels[rows]


def inputs(size: int, batch_size: int, num_batches: int, seed: int = 1) -> list[Tensor]:
    """Some batches of images alone, for what only wants to see data."""
    stream = batches(size, batch_size, seed)
    return [next(stream)[0] for _ in range(num_batches)]


def train(
    model: nn.Module,
    num_steps: int,
    *,
    size: int = 16,
    batch_size: int = 32,
    adam: bool = False,
    learning_rate: float | None = None,
    seed: int = 0,
    parameters: list[nn.Parameter] | None = None,
    after_step: AfterStep = lambda step, model: None,
) -> nn.Module:
    """Take so many steps, in whatever modes the model's layers are; `after_step` sees it after each.

    The learning rate falls to 0: the last batches were tracked at weights that hardly moved any more.
    """
    chosen = list(model.parameters()) if parameters is None else parameters
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(chosen, learning_rate or 1e-3)
        if adam
        else torch.optim.SGD(chosen, learning_rate or 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    stream = batches(size, batch_size, seed)
    for step in range(1, num_steps + 1):
        images, labels = next(stream)
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        after_step(step, model)
    return model


def seeded(make: Callable[P, T]) -> Callable[P, T]:
    """Call it once for its arguments, from a seed of its own, and hand out copies.

    So a network is the same whichever cases are made, and in whatever order.
    """

    @functools.cache
    def made(*values: P.args, **named: P.kwargs) -> T:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make(*values, **named)

    @functools.wraps(make)
    def copied(*values: P.args, **named: P.kwargs) -> T:
        return copy.deepcopy(made(*values, **named))

    return copied
