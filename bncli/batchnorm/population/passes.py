"""Batches that can be gone through more than once, and one batch through a model.

`Batches` is what every measurement takes: an iterable of inputs, or a function that returns a new iterator.
An input is a tensor (N, ...), or a tuple or list whose first element is that tensor (labels after it are
ignored). Where several passes are needed, every pass must give the same images; their order and how they
are cut may change.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

import torch
from torch import Tensor, nn

from bncli.errors import DataError

Batches = Iterable[object] | Callable[[], Iterator[object]]


def model_device(model: nn.Module) -> torch.device | None:
    """The device of the first parameter or buffer; None for a model that has neither."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return None if tensor is None else tensor.device


def inputs_of(batches: Batches, num_batches: int | None = None) -> Iterator[Tensor]:
    """One pass: the input of every batch that is not empty, or of the first `num_batches` of those.

    Raises DataError for a batch that is neither a tensor nor begins with one.
    """
    all_batches = iter(batches() if callable(batches) else batches)
    return islice((inputs for batch in all_batches if len(inputs := _input_of(batch))), num_batches)


def check_repeatable(batches: Batches) -> None:
    """Raise DataError for an iterator, which can be gone through only once."""
    if not callable(batches) and iter(batches) is batches:
        raise DataError(
            f"a {type(batches).__name__} can be read only once, but this needs several passes:"
            " give a list, a DataLoader, or a function that returns a new iterator"
        )


class SameImages:
    """Tells whether every pass saw the same images: their number, and the sum of all their values."""

    def __init__(self) -> None:
        self._first: tuple[int, float, float] | None = None
        self._now = (0, 0.0, 0.0)

    def see(self, inputs: Tensor) -> None:
        """Take in one batch of the pass."""
        values = inputs.detach().flatten()
        wide = values.double() if values.device.type != "mps" else values.cpu().double()
        num_images, total, magnitude = self._now
        self._now = (
            num_images + len(inputs),
            total + float(wide.sum()),
            magnitude + float(wide.abs().sum()),
        )

    def end_pass(self) -> None:
        """Compare with the first pass. Raises DataError if the images were others."""
        if self._first is None:
            self._first = self._now
        (first, total, magnitude), (now, again, _) = self._first, self._now
        self._now = (0, 0.0, 0.0)
        if first != now:
            raise DataError(f"the first pass gave {first:,} images and a later one {now:,}")
        if abs(total - again) > 1e-9 * magnitude:
            raise DataError("the images differ from pass to pass: leave out random augmentation")


def _input_of(batch: object) -> Tensor:
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, Tensor) or first.dim() == 0:
        raise DataError(
            f"a batch is a {type(batch).__name__}, expected a tensor (N, ...) or a tuple that begins with one"
        )
    return first
