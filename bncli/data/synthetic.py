"""The embedded data set: ten kinds of shapes and patterns, drawn in code, 32x32 pixels, in colour.

Each picture is a figure in one random colour on a ground of another, lighter or darker, with random
place, size and a small rotation, over a smooth random shading, with noise. Because colours come in both
polarities no single pixel says anything about the class: a linear classifier stays far below half, while
a small convolutional network gets nearly all right. No horizontal flip or small shift changes a class.

Figures are signed distances in pixels (negative inside), which gives soft edges without supersampling:
I. Quilez, "2D distance functions", https://iquilezles.org/articles/distfunctions2d/.

Images are drawn in blocks, each from its own stream (seed, split, block): the first n images are the same
whatever the number asked for, and blocks can be drawn in parallel.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from bncli.config import SyntheticConfig
from bncli.data.dataset import Dataset, Progress, Split
from bncli.data.memory import require_memory
from bncli.data.randomness import Stream, generator

Field = npt.NDArray[np.float32]  # (n, 32, 32), or (n, 1, 1): one value per image

CLASS_NAMES = (
    "disc",
    "ring",
    "square",
    "frame",
    "triangle",
    "cross",
    "saltire",
    "horizontal stripes",
    "vertical stripes",
    "checkerboard",
)
_SIZE = 32  # pixels
_BLOCK = 500  # images; a multiple of the number of classes, so that every block is balanced
_TURN = 0.2  # radians, about 11 degrees: cross and saltire, and both stripes, stay distinct
_SHADING = 60.0  # pixel values, largest slow change of brightness over the image
_MIN_CONTRAST = 28.0  # pixel values between figure and ground, in brightness
_NOISE = 85.0  # pixel values, largest; triangular distribution


def load_synthetic(
    config: SyntheticConfig, progress: Progress | None = None, *, only_train: bool = False
) -> Dataset:
    """Draw the data set; the same bits for the same `config.seed`, whatever the number of threads.

    With `only_train` the training split is the test split too.
    """
    num_images = {Stream.SYNTHETIC_TRAIN: config.num_train}
    if not only_train:
        num_images[Stream.SYNTHETIC_TEST] = config.num_test
    total, done = sum(num_images.values()), 0
    require_memory(
        total * (3 * _SIZE * _SIZE + 8),
        what=f"data: drawing {total:,} images",
        fix="set data.num_train or data.num_test lower",
    )
    splits = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for stream, num in num_images.items():
            blocks = range(-(-num // _BLOCK))
            images = np.empty((num, 3, _SIZE, _SIZE), np.uint8)
            labels = np.empty(num, np.int64)
            drawn = pool.map(lambda block, s=stream: _draw_block(generator(s, config.seed, block)), blocks)
            for block, (block_images, block_labels) in zip(blocks, drawn, strict=True):
                place = slice(block * _BLOCK, min(num, (block + 1) * _BLOCK))
                size = place.stop - place.start
                images[place], labels[place] = block_images[:size], block_labels[:size]
                done += size
                if progress is not None:
                    progress("draw images", done, total)
            splits.append(Split(torch.from_numpy(images), torch.from_numpy(labels)))
    return Dataset("synthetic", splits[0], splits[-1], CLASS_NAMES)


def _draw_block(rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Draw `_BLOCK` images (n, 3, 32, 32) with their labels (n,), in random order."""
    labels = rng.permutation(np.arange(_BLOCK) % len(CLASS_NAMES))
    u, v, radius = _coordinates(rng)
    inside = np.empty((_BLOCK, _SIZE, _SIZE), np.float32)
    for label, distance in enumerate(_DISTANCES):
        of_class = labels == label
        inside[of_class] = distance(u[of_class], v[of_class], radius[of_class])
    # an edge is one pixel wide: half covered where the distance is 0
    np.clip(np.float32(0.5) - inside, 0, 1, out=inside)
    ground, figure = _colours(rng)
    images = ground + (figure - ground) * inside[:, None]
    images += _shading(rng)[:, None]
    images += _noise(rng, images.shape)
    return np.clip(images, 0, 255).astype(np.uint8), labels


def _coordinates(rng: np.random.Generator) -> tuple[Field, Field, Field]:
    """Pixel coordinates (n, 32, 32) about each figure's centre and axes, and its radius (n, 1, 1)."""
    radius = rng.uniform(4.5, 10.5, (_BLOCK, 1, 1))
    centre = rng.uniform(-1, 1, (2, _BLOCK, 1, 1)) * (14 - radius) + (_SIZE - 1) / 2
    angle = rng.uniform(-_TURN, _TURN, (_BLOCK, 1, 1))
    # rounded to float32 before any pixel is touched: only + - * / sqrt follow, the same on all machines
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    y, x = (np.arange(_SIZE, dtype=np.float32).reshape(shape) for shape in ((1, -1, 1), (1, 1, -1)))
    y, x = y - centre[0].astype(np.float32), x - centre[1].astype(np.float32)
    return cos * x + sin * y, cos * y - sin * x, radius.astype(np.float32)


def _colours(rng: np.random.Generator) -> tuple[Field, Field]:
    """Ground and figure colours (n, 3, 1, 1), different in brightness, in either order."""
    middle = rng.uniform(85, 170, (_BLOCK, 1))
    contrast = rng.uniform(_MIN_CONTRAST, 110, (_BLOCK, 1)) * rng.choice((-1, 1), (_BLOCK, 1))
    tint = rng.uniform(-45, 45, (2, _BLOCK, 3))
    tint -= tint.mean(axis=2, keepdims=True)  # changes the hue, not the brightness
    pair = np.stack((middle - contrast / 2, middle + contrast / 2)) + tint
    ground, figure = pair.astype(np.float32)[..., None, None]
    return ground, figure


def _shading(rng: np.random.Generator) -> Field:
    """A smooth change of brightness (n, 32, 32): random values at 5x5 points, linear in between."""
    knots = rng.uniform(-_SHADING / 2, _SHADING / 2, (_BLOCK, 5, 5)).astype(np.float32)
    position = np.linspace(0, 4, _SIZE, dtype=np.float32)
    left = np.minimum(position.astype(np.int64), 3)
    part = position - left.astype(np.float32)
    rows = knots[:, left] * (1 - part)[:, None] + knots[:, left + 1] * part[:, None]
    return np.asarray(rows[:, :, left] * (1 - part) + rows[:, :, left + 1] * part)


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Field:
    """Independent noise per pixel and channel: the difference of two random bytes, scaled."""
    one, other = rng.integers(0, 256, (2, *shape), dtype=np.uint8).astype(np.float32)
    return np.asarray((one - other) * np.float32(_NOISE / 255))


def _box(u: Field, v: Field, half_width: Field, half_height: Field) -> Field:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _bars(u: Field, v: Field, radius: Field) -> Field:
    """A plus sign: the union of two bars."""
    thin = radius * np.float32(0.28)
    return np.minimum(_box(u, v, radius, thin), _box(u, v, thin, radius))


def _wave(u: Field, width: Field) -> Field:
    """Signed distance to stripes across u: `width` pixels wide, as far apart, edges at multiples."""
    phase = u / (2 * width)
    from_middle = np.abs(phase - np.floor(phase) - np.float32(0.5))
    distance: Field = (from_middle - np.float32(0.25)) * (2 * width)
    return distance


def _outline(distance: Field, width: Field) -> Field:
    """Keep what lies within `width` of the figure's edge."""
    outline: Field = np.abs(distance) - width
    return outline


def _disc(u: Field, v: Field, radius: Field) -> Field:
    return np.sqrt(u * u + v * v) - radius


def _ring(u: Field, v: Field, radius: Field) -> Field:
    width = radius * np.float32(0.2)
    return _outline(_disc(u, v, radius - width), width)


def _square(u: Field, v: Field, radius: Field) -> Field:
    side = radius * np.float32(0.9)  # as large to the eye as a disc
    return _box(u, v, side, side)


def _frame(u: Field, v: Field, radius: Field) -> Field:
    width = radius * np.float32(0.2)
    return _outline(_square(u, v, radius - width), width)


def _triangle(u: Field, v: Field, radius: Field) -> Field:
    """Equilateral, pointing up: below two slanted sides and above the base."""
    slanted = np.abs(u) * np.float32(3**0.5 / 2) - v * np.float32(0.5)
    distance: Field = np.maximum(slanted, v) - radius * np.float32(0.55)
    return distance


def _saltire(u: Field, v: Field, radius: Field) -> Field:
    half = np.float32(0.5**0.5)
    return _bars((u + v) * half, (v - u) * half, radius)


_PITCH = np.float32(0.36)  # width of a stripe, of the radius: 1.6 to 3.8 pixels


def _horizontal_stripes(u: Field, v: Field, radius: Field) -> Field:
    return _wave(v, radius * _PITCH)


def _vertical_stripes(u: Field, v: Field, radius: Field) -> Field:
    return _wave(u, radius * _PITCH)


def _checkerboard(u: Field, v: Field, radius: Field) -> Field:
    """Inside exactly one of the two kinds of stripes."""
    one, other = _vertical_stripes(u, v, radius), _horizontal_stripes(u, v, radius)
    return np.maximum(np.minimum(one, other), -np.maximum(one, other))


# in the order of CLASS_NAMES
_DISTANCES: tuple[Callable[[Field, Field, Field], Field], ...] = (
    _disc,
    _ring,
    _square,
    _frame,
    _triangle,
    _bars,
    _saltire,
    _horizontal_stripes,
    _vertical_stripes,
    _checkerboard,
)
