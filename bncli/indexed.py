"""Inputs with their labels that are asked for by number: from memory, or read whenever they are asked for.

Which images a sample or a batch has is decided by numbers alone. So what measures need not know where images
come from, and those that do not fit into memory are read by batches.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Indices = Tensor | range
"""Which inputs a batch has, in order: (B,) int64, or neighbours as a range with a step of 1."""

NO_LABEL = -1
"""In place of a label where there is none."""


@runtime_checkable
class Indexed(Protocol):
    """A data set, or a split of one."""

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64 on the CPU or where the inputs are; None: there are none."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of one input, such as (3, H, W)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs: uint8 pixels, or numbers that are what the network takes."""

    @property
    def device(self) -> torch.device:
        """Where batches appear."""

    @property
    def can_shuffle(self) -> bool:
        """Whether inputs can be asked for in any order; else only in their own, in rising numbers."""

    def __len__(self) -> int:
        """The number of inputs."""

    def batches_of(self, batches: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs (B, ...) and labels (B,) of every batch; without labels these are NO_LABEL."""


@dataclass(frozen=True)
class InMemory:
    """Inputs as a tensor."""

    images: Tensor  # (N, ...)
    labels: Tensor | None  # (N,)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.images.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs."""
        return self.images.dtype

    @property
    def device(self) -> torch.device:
        """Of the inputs."""
        return self.images.device

    @property
    def can_shuffle(self) -> bool:
        """Always."""
        return True

    def __len__(self) -> int:
        """The number of inputs."""
        return len(self.images)

    def batches_of(self, batches: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs (B, ...), which are views where numbers are a range, and labels (B,)."""
        labels = self.labels
        if labels is None:
            labels = torch.full((len(self),), NO_LABEL, device=self.device)
        for indices in batches:
            if isinstance(indices, range):
                yield tuple(each[indices.start : indices.stop] for each in (self.images, labels))  # type: ignore[misc]
            else:
                yield _select(self.images, indices), _select(labels, indices)


def _select(values: Tensor, indices: Tensor) -> Tensor:
    indices = indices.to(values.device)
    # the quicker one would lose the memory format of channels_last
    return values.index_select(0, indices) if values.is_contiguous() else values[indices]


def pick(data: Indexed, indices: Indices) -> Tensor:
    """The inputs (B, ...) of these numbers."""
    ((images, _),) = data.batches_of([indices])
    return images


def in_order(num_images: int, batch_size: int) -> Iterator[range]:
    """All numbers in order, in batches of which the last may be smaller."""
    for start in range(0, num_images, batch_size):
        yield range(start, min(num_images, start + batch_size))
