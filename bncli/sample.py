"""A random sample of labelled images in which every class has its share.

The first images of a data set are no sample: folders are sorted by class, so they may all be of one. Which
images a sample has is a function of the labels, their number and the seed: the same in every command, on
every machine.
"""

import torch
from torch import Tensor


def random_order(num_images: int, seed: int = 0) -> Tensor:
    """All indices (N,) int64 in the random order of a seed."""
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))


def stratified_sample(labels: Tensor, num_images: int, *, seed: int = 0) -> Tensor:
    """Indices (num_images,) int64 into labels (N,), in random order, without repeats.

    Each class has its share of the images to within one (largest remainders), and at least one image where
    there are as many images as classes: the classes that can best spare it give it. Where no fewer are asked
    for than there are, all of them in order.
    """
    labels = labels.cpu()
    if num_images >= len(labels):
        return torch.arange(len(labels))
    order = random_order(len(labels), seed)
    _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    quota = _quota(counts, num_images, seed)
    in_order = classes[order]
    rank = torch.empty_like(order)  # of an image among those of its class, in this order
    by_class = torch.argsort(in_order, stable=True)
    starts = torch.cumsum(counts, 0) - counts
    rank[by_class] = torch.arange(len(order)) - starts[in_order[by_class]]
    return order[rank < quota[in_order]]


def _quota(counts: Tensor, num_images: int, seed: int) -> Tensor:
    """How many images (num_classes,) each class gives: as near to its share as whole numbers can be.

    Between classes that are owed the same the seed decides, or of few images all would be of the first ones.
    """
    total = int(counts.sum())
    shares = counts * num_images  # over the number of all images
    least = 1 if num_images >= len(counts) else 0
    quota = (shares // total).clamp(min=least)
    lot = random_order(len(counts), seed)
    missing = num_images - int(quota.sum())
    if missing > 0:
        owed = (shares - quota * total)[lot]
        quota[lot[owed.argsort(descending=True, stable=True)[:missing]]] += 1
    for _ in range(-missing):  # given to classes that are too rare for their one image
        owed = (shares - quota * total).masked_fill(quota <= least, torch.iinfo(torch.int64).max)
        quota[lot[owed[lot].argmin()]] -= 1
    return quota
