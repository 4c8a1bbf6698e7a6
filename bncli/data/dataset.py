"""What every data set is: images with their labels, split into train and test."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bncli.errors import DataError
from bncli.indexed import Indexed, InMemory

Progress = Callable[[str, int, int | None], None]
"""Called as `progress(what, done, total)`, always in the thread that loads; None: nobody knows the total."""


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


NO_IMAGES = Dataset("no data set", InMemory(torch.empty(0), None), InMemory(torch.empty(0), None), ())
"""For what is computed from a checkpoint alone."""


def numbered_classes(*splits: Indexed) -> tuple[str, ...]:
    """Names of classes that have none: their numbers, as far as labels go."""
    highest = max((int(split.labels.max()) for split in splits if split.labels is not None), default=-1)
    return tuple(map(str, range(highest + 1)))


def for_training(dataset: Dataset) -> Dataset:
    """Check that a classifier can be trained on it; its classes have names in what is returned.

    Raises:
        DataError: it cannot; says why.
    """
    train = dataset.train
    problem = None
    if train.dtype != torch.uint8 or len(train.image_shape) != 3 or train.image_shape[0] != 3:
        found = f"{str(train.dtype).removeprefix('torch.')} {train.image_shape}"
        problem = f"training takes PIL images, or uint8 tensors (3, H, W), found {found}"
    elif not train.can_shuffle:
        problem = "an iterable data set cannot be shuffled, as training does; return one with a length"
    elif train.labels is None or dataset.test.labels is None:
        problem = "training needs labels; in an image folder these are the folders train/CLASS and test/CLASS"
    if problem is not None:
        raise DataError(f"data {dataset.name}: {problem}")
    names = dataset.class_names or numbered_classes(train, dataset.test)
    for split in (train, dataset.test):
        require_known(split, names, dataset.name)
    return replace(dataset, class_names=names)


def require_known(split: Indexed, names: tuple[str, ...], name: str) -> None:
    """Raise DataError for a label that is none of the classes."""
    if split.labels is None or not names:
        return
    wrong = (split.labels < 0) | (split.labels >= len(names))
    if bool(wrong.any()):
        label = int(split.labels[wrong][0])
        raise DataError(f"data {name}: label {label} found, but its classes are 0 to {len(names) - 1}")
