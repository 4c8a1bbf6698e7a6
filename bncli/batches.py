"""Data for every measurement: batches that can be gone through more than once.

`Batches` is what every function takes: an iterable of batches, such as a DataLoader or a list, or a function
that returns a new iterator. A single tensor (N, ...) is one batch; so is a pair of tensors, where labels are
needed. A batch is a tensor (N, ...), a tuple or list that begins with one and goes on with the labels, or a
dict that has both under their usual names. For all else give `get_input` (and `get_labels`): functions that
take a batch and return a tensor.

Where several passes are needed, every pass must give the same images; their order and how they are cut may
change.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bncli.errors import DataError

Batches = Iterable[object] | Callable[[], Iterable[object]]
GetTensor = Callable[[Any], Tensor]

INPUT_KEYS = ("image", "images", "pixel_values", "input", "inputs", "img", "imgs", "x")
LABEL_KEYS = ("label", "labels", "target", "targets", "y")


def inputs_of(batches: Batches, num_batches: int | None = None) -> Iterator[Tensor]:
    """One pass: the input of every batch that is not empty, or of the first `num_batches` of those.

    Raises DataError for a batch that holds no tensor (N, ...) where one is looked for.
    """
    inputs = (_checked(find_input(batch), batch) for batch in _one_pass(batches))
    return islice((one for one in inputs if len(one)), num_batches)


def labelled(
    batches: Batches, get_input: GetTensor | None = None, get_labels: GetTensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass: input (N, ...) and labels (N,) of every batch that is not empty.

    Raises DataError for a batch that has no labels, or no tensor (N, ...) where one is looked for.
    """
    if _is_pair(batches):
        batches = [batches]
    for batch in _one_pass(batches):
        inputs = _checked(find_input(batch) if get_input is None else get_input(batch), batch)
        labels = find_labels(batch) if get_labels is None else get_labels(batch)
        if not isinstance(labels, Tensor):
            raise DataError(
                f"a batch is {_describe(batch)}, and its labels are not found: give pairs (images, labels),"
                " or get_labels"
            )
        if len(inputs):
            yield inputs, labels


def gather(
    batches: Batches, get_input: GetTensor | None = None, get_labels: GetTensor | None = None
) -> tuple[Tensor, Tensor]:
    """All images (N, ...) and labels (N,) in memory; a pair of tensors is taken as it is, without a copy.

    Raises DataError for a batch without labels, or without images at all.
    """
    if _is_pair(batches) and get_input is None and get_labels is None:
        whole: tuple[Tensor, Tensor] = batches  # type: ignore[assignment]
        return whole
    pairs = list(labelled(batches, get_input, get_labels))
    if not pairs:
        raise DataError("there is nothing to measure: the batches hold no images")
    images, labels = zip(*pairs, strict=True)
    return torch.cat(list(images)), torch.cat(list(labels))


def gather_inputs(batches: Batches, num_images: int, get_input: GetTensor | None = None) -> Tensor:
    """The first `num_images` images (n, ...), or as many as there are; a tensor is not copied.

    Raises DataError where there is none.
    """
    found: list[Tensor] = []
    missing = num_images
    for inputs in inputs_of(read_with(batches, get_input)):
        found.append(inputs[:missing])
        missing -= len(found[-1])
        if missing <= 0:
            break
    if not found:
        raise DataError("there is nothing to check: no images")
    return found[0] if len(found) == 1 else torch.cat(found)


def read_with(batches: Batches, get_input: GetTensor | None) -> Batches:
    """The batches with `get_input` applied to each; as they are without it."""
    if get_input is None:
        return batches
    if not callable(batches) and iter(batches) is batches:
        return map(get_input, batches)  # can be read only once, as before
    return lambda: map(get_input, _one_pass(batches))


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


def _one_pass(batches: Batches) -> Iterator[object]:
    if isinstance(batches, Tensor):
        return iter([batches])
    return iter(batches() if callable(batches) else batches)


def _is_pair(batches: object) -> bool:
    return isinstance(batches, tuple) and len(batches) == 2 and all(isinstance(b, Tensor) for b in batches)


def find_input(batch: object) -> object:
    """The inputs of a batch, or the input of a sample, where they usually are."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in INPUT_KEYS if key in batch), batch)
    return batch[0] if isinstance(batch, tuple | list) and batch else batch


def find_labels(batch: object) -> object:
    """The labels of a batch, or the label of a sample; None: there are none where they usually are."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None


def _checked(found: object, batch: object) -> Tensor:
    if not isinstance(found, Tensor) or found.dim() == 0:
        raise DataError(
            f"a batch is {_describe(batch)}, expected a tensor (N, ...), a tuple that begins with one, or a"
            f" dict that has one under {INPUT_KEYS[0]!r}; for others give get_input"
        )
    return found


def _describe(batch: object) -> str:
    if isinstance(batch, Mapping):
        keys = ", ".join(map(str, list(batch)[:6]))
        return f"a {type(batch).__name__} with the keys {keys}"
    return f"a {type(batch).__name__}"
