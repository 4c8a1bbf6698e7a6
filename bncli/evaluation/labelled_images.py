"""Labelled images that are asked for by number, from whatever batches they come in."""

from torch import Tensor

from bncli.batches import Batches, GetTensor, gather
from bncli.errors import DataError
from bncli.indexed import Indexed, InMemory


def labelled_images(
    data: Batches | Indexed, get_input: GetTensor | None = None, get_labels: GetTensor | None = None
) -> tuple[Indexed, Tensor]:
    """The data and their labels (N,); batches are gathered in memory, a pair of tensors is not copied.

    Raises DataError where there are no labels.
    """
    if not isinstance(data, Indexed):
        data = InMemory(*gather(data, get_input, get_labels))
    if data.labels is None:
        raise DataError("the images have no labels, so nothing tells whether a prediction is right")
    return data, data.labels
