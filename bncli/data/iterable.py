"""Inputs that come in one order only, as those of an iterable data set do: each pass reads them anew."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from bncli.data.streamed import Sample, check_alike
from bncli.errors import DataError
from bncli.indexed import Indices


class IterableSplit:
    """A split of `size` inputs that `begin` gives from the first one on, whenever it is called.

    `name` is what errors call the data set.

    Numbers that do not rise are found too, by beginning anew.
    """

    can_shuffle = False
    device = torch.device("cpu")

    def __init__(
        self, begin: Callable[[], Iterator[Sample]], size: int, labels: Tensor | None, name: str = ""
    ) -> None:
        self.labels = labels
        self._begin, self._size, self._name = begin, size, name
        self._first, _ = next(begin())
        self.image_shape: tuple[int, ...] = tuple(self._first.shape)
        self.dtype = torch.from_numpy(self._first).dtype

    def relabelled(self, new_labels: Tensor) -> "IterableSplit":
        """The same with `new_labels[label]` for each label; the last one is for NO_LABEL."""
        numbers = new_labels.tolist()
        return IterableSplit(
            lambda: ((found, numbers[label]) for found, label in self._begin()),
            self._size,
            None if self.labels is None else new_labels[self.labels],
            self._name,
        )

    def __len__(self) -> int:
        """Return the number of inputs."""
        return self._size

    def batches_of(self, batches: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs (B, ...) and labels (B,) of every batch.

        Raises:
            DataError: an input cannot be read, or a later pass gives fewer of them.
        """
        stream, position = self._begin(), 0
        for batch in batches:
            numbers = list(batch) if isinstance(batch, range) else batch.tolist()
            found: dict[int, Sample] = {}
            for number in sorted(set(numbers)):
                if number < position:
                    stream, position = self._begin(), 0
                for sample in stream:
                    position += 1
                    if position > number:
                        found[number] = sample
                        break
                else:
                    found_later = f"the first pass gave {self._size:,} inputs and a later one {position:,}"
                    raise DataError(f"{self._name and f'data {self._name}: '}{found_later}")
            inputs, labels = zip(*(found[number] for number in numbers), strict=True)
            check_alike(self._first, inputs, numbers, self._name)
            yield torch.from_numpy(np.stack(inputs)), torch.tensor(labels)
