"""Training images to measure statistics on, where the network computes."""

from typing import TYPE_CHECKING

from bncli.data import Split, sample_batches
from bncli.runtime import Runtime

if TYPE_CHECKING:
    from bncli.batches import Batches


def training_sample(split: Split, runtime: Runtime, batch_size: int, num_images: int) -> "Batches":
    """Images of the split on the device, as often as a measurement wants to go through them."""
    return lambda: (runtime.place(images) for images, _ in sample_batches(split, batch_size, num_images))
