"""Does an image's answer depend on its batch? In eval mode it must not; in train mode it does.

The reference is every image alone. Eval-mode BatchNorm uses only the running statistics, so in exact
arithmetic the companions, the place and the number of images cannot matter; with real kernels they can in
the last bits, because another number of rows may select another order of summation (pytorch#116501).
Two questions are therefore answered apart: are the bits the same, and is the prediction?
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bncli.errors import DataError
from bncli.evaluation.forward import forward, model_device
from bncli.stats.bits import bitwise_equal
from bncli.stats.modes import buffers_digest, eval_mode, preserved_buffers, train_mode


@dataclass(frozen=True)
class BatchSizeCheck:
    """Eval mode, batches of one size against every image alone; in the given and in a shuffled order."""

    batch_size: int  # as used: never more than there are images
    requested_batch_sizes: tuple[int, ...]  # those that come down to this size
    bitwise_equal: bool  # in both orders
    shuffled_bitwise_equal: bool  # in the shuffled order
    max_abs_diff: float  # between logits, in both orders; inf: a NaN in one where the other has none
    prediction_flips: int  # images whose prediction differs in either order


@dataclass(frozen=True)
class TrainModeContrast:
    """The same comparison in train mode, where batch statistics tie the images together."""

    batch_size: int
    reference_batch_size: int  # 1, or 2 where BatchNorm refuses a batch of one
    max_abs_diff: float  # between logits
    prediction_flips: int


@dataclass(frozen=True)
class Determinism:
    """What was found for one model and one set of images."""

    num_images: int
    seed: int  # of the shuffled order and of train mode's random numbers
    repeat_bitwise_equal: bool  # every image alone, twice
    batch_sizes: tuple[BatchSizeCheck, ...]
    train_mode: TrainModeContrast | None  # None: a single image, refused as a batch of one
    running_stats_unchanged: bool  # every buffer, after eval mode and at the end, bit for bit

    @property
    def deterministic(self) -> bool:
        """No prediction depends on the batch in eval mode, whatever the last bits do."""
        return all(check.prediction_flips == 0 for check in self.batch_sizes)


def check_determinism(
    model: nn.Module,
    images: Tensor,
    *,
    batch_sizes: Sequence[int] = (2, 7, 64, 256),
    seed: int = 0,
) -> Determinism:
    """Compare the logits of images (N, ...) alone and in batches, in eval mode and in train mode.

    Works for any module that returns logits (N, num_classes). Modes, buffers and the random-number state
    (CPU, and the model's CUDA device) are restored, also if the model raises. Costs 2 N forward passes of
    one image, 2 passes over the images per batch size, and 2 in train mode. Keeps logits only.

    Raises DataError without images, ValueError for a batch size below 1.
    """
    if len(images) == 0:
        raise DataError("there is nothing to check: no images")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch sizes must be 1 or more, got {list(batch_sizes)}")
    before = buffers_digest(model)
    with preserved_buffers(model), _preserved_rng(model), torch.no_grad():
        with eval_mode(model):
            alone = _logits(model, images, 1)
            repeat_bitwise_equal = bitwise_equal(alone, _logits(model, images, 1))
            checks = _check_batch_sizes(model, images, alone, batch_sizes, seed)
        unchanged = buffers_digest(model) == before
        with train_mode(model):
            contrast = _contrast(model, images, max(batch_sizes), seed)
    return Determinism(
        num_images=len(images),
        seed=seed,
        repeat_bitwise_equal=repeat_bitwise_equal,
        batch_sizes=checks,
        train_mode=contrast,
        running_stats_unchanged=unchanged and buffers_digest(model) == before,
    )


def _check_batch_sizes(
    model: nn.Module, images: Tensor, alone: Tensor, batch_sizes: Sequence[int], seed: int
) -> tuple[BatchSizeCheck, ...]:
    requests: dict[int, list[int]] = {}
    for size in sorted(set(batch_sizes)):
        requests.setdefault(min(size, len(images)), []).append(size)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    checks = []
    for size, requested in requests.items():
        logits = _logits(model, images, size)
        shuffled = torch.empty_like(logits)
        shuffled[order] = _logits(model, images, size, order)
        flips = (_predictions(logits) != _predictions(alone)) | (
            _predictions(shuffled) != _predictions(alone)
        )
        shuffled_bitwise_equal = bitwise_equal(shuffled, alone)
        checks.append(
            BatchSizeCheck(
                batch_size=size,
                requested_batch_sizes=tuple(requested),
                bitwise_equal=bitwise_equal(logits, alone) and shuffled_bitwise_equal,
                shuffled_bitwise_equal=shuffled_bitwise_equal,
                max_abs_diff=max(_max_abs_diff(logits, alone), _max_abs_diff(shuffled, alone)),
                prediction_flips=int(flips.sum()),
            )
        )
    return tuple(checks)


def _contrast(model: nn.Module, images: Tensor, batch_size: int, seed: int) -> TrainModeContrast | None:
    _seed(model, seed)
    reference_size = 1
    try:
        reference = _logits(model, images, 1)
    except ValueError as error:  # BatchNorm with a single value per channel
        if "Expected more than 1 value per channel" not in str(error):
            raise
        if len(images) == 1:
            return None
        _seed(model, seed)
        reference_size = 2
        reference = _logits(model, images, 2, smallest=2)
    size = max(min(batch_size, len(images)), reference_size)
    logits = _logits(model, images, size, smallest=reference_size)
    return TrainModeContrast(
        batch_size=size,
        reference_batch_size=reference_size,
        max_abs_diff=_max_abs_diff(logits, reference),
        prediction_flips=int((_predictions(logits) != _predictions(reference)).sum()),
    )


def _logits(
    model: nn.Module, images: Tensor, size: int, order: Tensor | None = None, smallest: int = 1
) -> Tensor:
    """Logits (N, num_classes) on the CPU, in their own dtype, row i for image `order[i]`."""
    batches = []
    for rows in _chunks(len(images), size, smallest):
        batch = images[rows] if order is None else images[order[rows]]
        batches.append(forward(model, batch).cpu())
    return torch.cat(batches)


def _chunks(count: int, size: int, smallest: int) -> Iterator[slice]:
    """Consecutive slices of `size`; a last one below `smallest` is added to the one before it."""
    start = 0
    while start < count:
        stop = min(start + size, count)
        if 0 < count - stop < smallest:
            stop = count
        yield slice(start, stop)
        start = stop


def _predictions(logits: Tensor) -> Tensor:
    """The predicted class (N,); -1 for a row with a NaN, which predicts nothing."""
    return logits.double().argmax(1).masked_fill(logits.isnan().any(1), -1)


def _max_abs_diff(first: Tensor, second: Tensor) -> float:
    """Largest difference in float64: equal infinities and two NaNs differ by 0, one NaN by infinity."""
    first, second = first.double(), second.double()
    same = (first == second) | (first.isnan() & second.isnan())
    diff = (first - second).abs().masked_fill(same, 0.0)
    return float(diff.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def _preserved_rng(model: nn.Module) -> AbstractContextManager[None]:
    """Restore the random-number state of the CPU and of the model's CUDA device at the end."""
    return torch.random.fork_rng(_cuda_devices(model), device_type="cuda")


def _seed(model: nn.Module, seed: int) -> None:
    # not torch.manual_seed: it would also reseed devices whose state is not restored
    torch.default_generator.manual_seed(seed)
    for index in _cuda_devices(model):
        torch.cuda.default_generators[index].manual_seed(seed)


def _cuda_devices(model: nn.Module) -> list[int]:
    device = model_device(model)
    return [device.index] if device is not None and device.type == "cuda" else []
