"""The mean and standard deviation of pixels per channel, measured exactly.

Pixels are integers in [0, 255], so their sum and the sum of their squares are integers, which have no
rounding; only the final division is in float64. The deviation is over all pixels and biased (divided by the
count). For CIFAR-10 that is mean (0.4914, 0.4822, 0.4465) and std (0.2470, 0.2435, 0.2616); the often copied
(0.2023, ...) is the mean of per-image deviations instead.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bncli.data.randomness import Stream, generator
from bncli.errors import ConfigError, DataError
from bncli.indexed import Indexed, Indices, InMemory, in_order
from bncli.models.normalized import NAMED

MEASURED = "measured"
NUM_SAMPLED = 2_000  # images that are measured of those that are not in memory

_SAMPLE_BATCH = 50
# pixels a channel: 6 MiB in float32 in each thread; a memory-mapped set is never in memory as a whole
_CHUNK = 1 << 19
_ROW = 256  # pixels
_MAX_THREADS = 4  # each holds a chunk


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation in units of [0, 1], that is of pixel / 255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def parse_normalization(text: str, key: str = "data.normalization") -> Normalization | None:
    """Read a normalization as people write it; None: it is to be measured. `key` names it in errors.

    Raises:
        ConfigError: it is none.
    """
    if text == MEASURED:
        return None
    if text in NAMED:
        mean, std = NAMED[text]
        return Normalization(mean, std)
    try:
        (a, b, c), (d, e, f) = ([float(part) for part in half.split(",")] for half in text.split("/"))
    except ValueError:
        values: tuple[float, ...] = (-1.0,)
    else:
        values = (a, b, c, d, e, f)
    if not all(0 <= value <= 1 for value in values) or not all(values[3:]):
        expected = (
            "imagenet, half, none, measured, or means and deviations such as 0.5,0.5,0.5/0.25,0.25,0.25"
        )
        raise ConfigError(key, [f"expected {expected}, found {text!r}"])
    return Normalization(values[:3], values[3:])  # type: ignore[arg-type]  # of three each


def chosen_normalization(text: str | None, split: Indexed, default: str = MEASURED) -> Normalization | None:
    """What is done to the inputs of a split; None: they are what the network takes, unless `text` says more.

    Raises:
        ConfigError: `text` is no normalization.
        DataError: the split is to be measured, and has no images of three channels.
    """
    if split.dtype != torch.uint8 and text in (None, "none"):
        return None
    found = parse_normalization(text or default)
    if found is not None:
        return found
    if split.dtype != torch.uint8 or len(split.image_shape) != 3 or split.image_shape[0] != 3:
        raise DataError(
            f"data.normalization: measured is for uint8 images (3, H, W), found {split.dtype}"
            f" {split.image_shape}; set it to none"
        )
    return normalization_of(split)


def normalization_of(split: Indexed) -> Normalization:
    """Measure a split: in memory all of its images, else NUM_SAMPLED of them.

    Raises:
        DataError: there are no images, or they are no uint8 pixels in three channels.
    """
    if isinstance(split, InMemory):
        return measure_normalization(split.images)
    num_images = min(NUM_SAMPLED, len(split))
    if split.can_shuffle:
        order = generator(Stream.SAMPLE, len(split)).permutation(len(split))[:num_images]
        batches: Iterable[Indices] = torch.from_numpy(order).split(_SAMPLE_BATCH)
    else:
        batches = in_order(num_images, _SAMPLE_BATCH)
    return _normalization(images for images, _ in split.batches_of(batches))


def measure_normalization(images: Tensor) -> Normalization:
    """Measure uint8 images (N, 3, H, W).

    A channel that is constant gets std 1/255, one step of a pixel, so that normalising stays finite (its
    values become 0 whatever the divisor).

    Raises:
        DataError: there are no images.
    """
    return _normalization([images])


def _normalization(batches: Iterable[Tensor]) -> Normalization:
    num_pixels, totals, totals_of_squares = 0, [0, 0, 0], [0, 0, 0]
    for images in batches:
        if images.numel():
            num_pixels += images.numel() // images.shape[1]
            sums, squares = _sums(images)
            totals = [one + more for one, more in zip(totals, sums, strict=True)]
            totals_of_squares = [one + more for one, more in zip(totals_of_squares, squares, strict=True)]
    if num_pixels == 0:
        raise DataError("cannot measure mean and deviation: there are no images")
    means, stds = [], []
    for total, total_squares in zip(totals, totals_of_squares, strict=True):
        # Python's integers are exact at any size: n * sum(x^2) - sum(x)^2 does not cancel
        variance = (num_pixels * total_squares - total * total) / num_pixels**2
        means.append(total / num_pixels / 255)
        stds.append((variance**0.5 if variance > 0 else 1.0) / 255)
    return Normalization(mean=(means[0], means[1], means[2]), std=(stds[0], stds[1], stds[2]))


def _sums(images: Tensor) -> tuple[list[int], list[int]]:
    """Of the pixels of each channel, and of their squares.

    With numpy in as many threads as PyTorch has, which wait for each other once: PyTorch's own would in
    every call, which took 14 s beside another busy process.
    """
    chunks = images.split(max(1, _CHUNK // (images.shape[2] * images.shape[3])))
    with ThreadPoolExecutor(min(_MAX_THREADS, torch.get_num_threads())) as pool:
        sums: npt.NDArray[np.int64] = sum(pool.map(_sums_of_chunk, chunks), np.zeros((2, 3), np.int64))
    totals, squares = sums.tolist()
    return totals, squares


def _sums_of_chunk(images: Tensor) -> npt.NDArray[np.int64]:
    """The same of a few images: (2, 3).

    In float32 256 pixels at a time, which is exact: 256 * 255**2 < 2**24.
    """
    sums = np.zeros((2, 3), np.int64)
    plane = images.shape[2] * images.shape[3]
    whole = plane - plane % _ROW
    planes = images.cpu().numpy().reshape(len(images), 3, plane)
    rows = planes[:, :, :whole].reshape(len(images), 3, whole // _ROW, _ROW)
    for pixels in (rows, planes[:, :, None, whole:]):
        values = pixels.astype(np.float32)
        ones = np.ones(values.shape[3], np.float32)
        sums[0] += (values @ ones).sum((0, 2), dtype=np.float64).astype(np.int64)
        sums[1] += (np.square(values, out=values) @ ones).sum((0, 2), dtype=np.float64).astype(np.int64)
    return sums
