"""A random sample of labelled images in which every class has its share.

The first images of a data set are no sample: folders are sorted by class, so they may all be of one. Which
images a sample has is a function of the labels, their number and the seed: the same in every command, on
every machine.
"""

import torch
from torch import Tensor


def stratified_sample(labels: Tensor, num_images: int, *, seed: int = 0) -> Tensor:
    """Indices (num_images,) int64 into labels (N,), in random order, without repeats.

    Each class has its share of the images to within one (largest remainders), and at least one image where
    there are as many images as classes. Where no fewer are asked for than there are, all of them in order.
    """
    labels = labels.cpu()
    if num_images >= len(labels):
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    quota = _quota(counts, num_images)
    in_order = classes[order]
    rank = torch.empty_like(order)  # of an image among those of its class, in this order
    by_class = torch.argsort(in_order, stable=True)
    starts = torch.cumsum(counts, 0) - counts
    rank[by_class] = torch.arange(len(order)) - starts[in_order[by_class]]
    return order[rank < quota[in_order]]


def _quota(counts: Tensor, num_images: int) -> Tensor:
    """How many images (num_classes,) each class gives."""
    shares = counts * num_images  # over the number of all images
    total = int(counts.sum())
    quota = shares // total
    largest = torch.argsort(shares % total, descending=True, stable=True)
    quota[largest[: num_images - int(quota.sum())]] += 1
    if num_images >= len(counts):
        for empty in (quota == 0).nonzero().flatten():
            quota[quota.argmax()] -= 1
            quota[empty] = 1
    return quota
