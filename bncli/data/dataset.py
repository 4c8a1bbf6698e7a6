"""What every data set is: images with their labels, split into train and test."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bncli.errors import DataError
from bncli.indexed import Indexed, InMemory

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`, always in the thread that loads."""


@dataclass(frozen=True)
class Split(InMemory):
    """Images with their labels, in memory.

    Raises:
        DataError: shapes or types are others than those below, or the lengths differ.
    """

    images: Tensor  # (N, 3, H, W) uint8
    labels: Tensor  # (N,) int64, indices into the class names

    def __post_init__(self) -> None:
        """Check shapes and types once, here, so that nothing behind has to."""
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            found = f"{images.dtype} {tuple(images.shape)}"
            raise DataError(f"images must be uint8 of shape (N, 3, H, W), found {found}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            found = f"{labels.dtype} {tuple(labels.shape)}"
            raise DataError(f"labels must be int64 of shape ({len(images)},), found {found}")

    def __repr__(self) -> str:
        """How many images of what size."""
        height, width = self.images.shape[2:]
        return f"Split({len(self):,} images of {height}x{width} pixels)"


@dataclass(frozen=True)
class Dataset:
    """A training and a test split over the same classes."""

    name: str
    train: Indexed
    test: Indexed
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what its user should be told, each one sentence
