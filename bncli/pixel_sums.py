"""The sums of pixels and of their squares per channel, exactly. Without torch, like `cifar10_files`.

Pixels are integers in [0, 255], so both are integers, which have no rounding.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_CHUNK = 1 << 17  # pixels a channel: 1.5 MiB in float32; a memory-mapped set is never in memory as a whole
_ROW = 256  # pixels


@dataclass(frozen=True)
class PixelSums:
    """Of each channel, over all images."""

    totals: tuple[int, ...]
    squares: tuple[int, ...]


def sum_pixels(images: npt.NDArray[np.uint8]) -> PixelSums:
    """Of images (N, C, H, W).

    In float32 256 at a time, which is exact: 256 * 255**2 < 2**24. With numpy, on one thread: 0.05 s for
    50,000 images of 32x32, where counting each value takes 0.14. On threads torch would wait for them in
    every call, which took 14 s beside another busy process.
    """
    channels = images.shape[1]
    totals, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    plane = images.shape[2] * images.shape[3]
    whole = plane - plane % _ROW
    step = max(1, _CHUNK // plane)
    for start in range(0, len(images), step):
        planes = images[start : start + step].reshape(-1, channels, plane)
        rows = planes[:, :, :whole].reshape(len(planes), channels, whole // _ROW, _ROW)
        for pixels in (rows, planes[:, :, None, whole:]):
            values = pixels.astype(np.float32)
            ones = np.ones(values.shape[3], np.float32)
            totals += (values @ ones).sum((0, 2), dtype=np.float64).astype(np.int64)
            squares += (np.square(values, out=values) @ ones).sum((0, 2), dtype=np.float64).astype(np.int64)
    return PixelSums(tuple(totals.tolist()), tuple(squares.tolist()))
