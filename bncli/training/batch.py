"""The images of one training step."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from bncli.data import num_micro_batches


@dataclass(frozen=True, eq=False)
class Batch:
    """Images with their labels, all on one device."""

    images: Tensor  # (B, 3, H, W) uint8
    labels: Tensor  # (B,) int64
    places: Tensor | None = None  # (B,) int64, in the training split: whose losses are kept; None: nobody's
    weights: Tensor | None = None  # (B,) float32, for how many images each one stands; None: for itself

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def parts(self, size: int | None) -> Iterator["Batch"]:
        """As few batches as hold at most `size` images each, equal to within one; None: the batch itself."""
        if size is None:
            yield self
            return
        count = num_micro_batches(len(self), size)
        images, labels = self.images.tensor_split(count), self.labels.tensor_split(count)
        places, weights = (
            (None,) * count if each is None else each.tensor_split(count)
            for each in (self.places, self.weights)
        )
        yield from map(Batch, images, labels, places, weights)
