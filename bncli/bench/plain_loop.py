"""The rival of the training step: the loop that a tutorial shows, in a process of its own.

It allocates memory as PyTorch does unless told otherwise: `runtime.reuse_memory` is off there.
"""

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from bncli.config import AugmentConfig, Config
from bncli.data import Dataset
from bncli.errors import BncliError
from bncli.models import build_configured
from bncli.runtime import synchronize
from bncli.torchvision_compat import import_torchvision
from bncli.training import Setup, prepare
from bncli.training.losses import loss_and_logits
from bncli.training.optimizer import build_optimizer

_SECONDS_TO_END = 10.0  # of a process that may be in the midst of a round


@contextlib.contextmanager
def plain_process(config: Config, num_steps: int, workers: int) -> Iterator[Callable[[], float]]:
    """A process that waits; each call has it run a round, and returns its images per second.

    Raises:
        BncliError: from the call, when the plain loop failed or its process was killed.
    """
    runtime = config.runtime.model_copy(update={"reuse_memory": False, "compile": False})
    config = config.model_copy(update={"runtime": runtime})
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's allocator
    here, there = context.Pipe()
    process = context.Process(target=_serve_rounds, args=(there, config, num_steps, workers))
    process.start()
    there.close()

    def next_round() -> float:
        try:
            here.send(None)
            answer = here.recv()
        except (EOFError, OSError):
            raise BncliError("the process of the plain loop ended; is there memory for both loops?") from None
        if isinstance(answer, str):
            raise BncliError(f"the plain loop failed: {answer}")
        return float(answer)

    try:
        yield next_round
    finally:
        here.close()  # which ends it, and the DataLoader's workers with it
        process.join(_SECONDS_TO_END)
        process.terminate()
        process.join()


def _serve_rounds(connection: Connection, config: Config, num_steps: int, workers: int) -> None:
    """Answer each message with the rate of one round, or with what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to handle
    # a process that was spawned spawns its own; the DataLoader's workers start as they do in any program
    multiprocessing.set_start_method(None, force=True)
    try:
        rounds = _plain_rounds(prepare(config), num_steps, workers)
        while True:
            connection.recv()
            connection.send(next(rounds))
    except EOFError:  # no more rounds are wanted
        return
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}")


def _plain_rounds(setup: Setup, num_steps: int, workers: int) -> Iterator[float]:
    """Images per second of `num_steps` steps of the plain loop, again and again."""
    model = _plain_twin(setup)
    model.load_state_dict(setup.model.state_dict())  # with the whitening that was fitted
    model.train()
    optimizer = build_optimizer(model, setup.config.train)
    loader = torch.utils.data.DataLoader(
        _PlainImages(setup.dataset, setup.config.augment),
        batch_size=setup.plan.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    device = setup.runtime.device
    batches = iter(loader)
    next(batches)  # the workers have started
    while True:
        num_images = 0
        start = time.perf_counter()
        for _ in range(num_steps):
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
            images, labels = batch[0].to(device), batch[1].to(device)
            loss, _ = loss_and_logits(model(images), labels, setup.config.train.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            num_images += len(labels)
        synchronize(setup.runtime.device)
        yield num_images / (time.perf_counter() - start)


def _plain_twin(setup: Setup) -> nn.Module:
    """The same network in float32 with contiguous weights."""
    model = build_configured(
        setup.config.model,
        len(setup.dataset.class_names),
        image_size=setup.image_shape[-1],
        mean=setup.normalization.mean,
        std=setup.normalization.std,
        keep_helpers=True,
    )
    return model.to(setup.runtime.device)


class _PlainImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Samples as torchvision's data sets give them: a PIL image through transforms, and its label."""

    def __init__(self, dataset: Dataset, augment: AugmentConfig) -> None:
        import_torchvision()
        from torchvision import transforms

        side = dataset.train.image_shape[-1]
        steps: list[Any] = []
        if augment.crop_padding:
            steps.append(transforms.RandomCrop(side, padding=augment.crop_padding, padding_mode="reflect"))
        if augment.flip != "none":
            steps.append(transforms.RandomHorizontalFlip())
        self._transform = transforms.Compose([*steps, transforms.ToTensor()])
        # as torchvision's CIFAR10 keeps them: an array (N, H, W, 3)
        ((images, labels),) = dataset.train.batches_of([range(len(dataset.train))])
        self._images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self._labels = labels.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        image = self._transform(Image.fromarray(self._images[index]))  # (3, H, W) in 0..1
        return image, self._labels[index]
