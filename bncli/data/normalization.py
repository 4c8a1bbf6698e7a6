"""The mean and standard deviation of pixels per channel, measured exactly.

Pixels are integers in [0, 255], so their histogram says everything and has no rounding; only the final
division is in float64. The deviation is over all pixels and biased (divided by the count). For CIFAR-10
that is mean (0.4914, 0.4822, 0.4465) and std (0.2470, 0.2435, 0.2616); the often copied (0.2023, ...) is
the mean of per-image deviations instead.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bncli.errors import DataError

_CHUNK = 1 << 19  # pixels a channel; small, so that a memory-mapped set is never in memory as a whole


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation in units of [0, 1], that is of pixel / 255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def measure_normalization(images: Tensor) -> Normalization:
    """Measure uint8 images (N, 3, H, W).

    A channel that is constant gets std 1/255, one step of a pixel, so that normalising stays finite (its
    values become 0 whatever the divisor).

    Raises:
        DataError: there are no images.
    """
    if images.numel() == 0:
        raise DataError("cannot measure mean and deviation: there are no images")
    counts = _histograms(images)
    values = np.arange(256)
    num_pixels = int(counts[0].sum())
    means, stds = [], []
    totals, totals_of_squares = (counts @ values).tolist(), (counts @ values**2).tolist()
    for total, total_squares in zip(totals, totals_of_squares, strict=True):
        # Python's integers are exact at any size: n * sum(x^2) - sum(x)^2 does not cancel
        variance = (num_pixels * total_squares - total * total) / num_pixels**2
        means.append(total / num_pixels / 255)
        stds.append((variance**0.5 if variance > 0 else 1.0) / 255)
    return Normalization(mean=(means[0], means[1], means[2]), std=(stds[0], stds[1], stds[2]))


def _histograms(images: Tensor) -> npt.NDArray[np.int64]:
    """Count every pixel value per channel: (3, 256).

    With numpy, on one thread, two pixels at a time: 0.14 s for 50,000 images of 32x32, one at a time
    0.20 s. torch.bincount takes half of that on idle cores, but waits for its threads in every call and took
    14 s beside another busy process.
    """
    counts = np.zeros((3, 256), np.int64)
    for chunk in images.split(max(1, _CHUNK // (images.shape[2] * images.shape[3]))):
        pixels = chunk.cpu().numpy()
        for channel in range(3):
            values = pixels[:, channel].ravel()
            whole = len(values) // 2 * 2
            pairs = np.bincount(values[:whole].view(np.uint16), minlength=1 << 16).reshape(256, 256)
            counts[channel] += pairs.sum(0) + pairs.sum(1) + np.bincount(values[whole:], minlength=256)
    return counts
