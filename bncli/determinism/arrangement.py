"""Batches of one size in which the same images stand in another company, or at another place.

A batch is a row of an index matrix (num_batches, batch_size): which image stands at which place. Two
matrices together with where each image went test one claim and no other: one that keeps places and
changes companions, one that keeps companions and changes places.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rearranged:
    """The images of an arrangement, put elsewhere."""

    images: Tensor  # (num_batches, batch_size) int64
    moved_to: Tensor  # (num_batches, batch_size) int64, where each image of the original stands, flattened


def one_by_one(num_images: int) -> Tensor:
    """Every image in a batch of its own (num_images, 1), in order."""
    return torch.arange(num_images)[:, None]


def consecutive(num_images: int, batch_size: int) -> Tensor:
    """At least two batches (num_batches, batch_size) that show every image, of two or more.

    The images follow each other, and after the last one they start again. Where they all fit into one
    batch, the second one has the first two images in turn.
    """
    places = torch.arange(batch_size)
    if batch_size >= num_images:
        return torch.stack([places % num_images, (places + 1) % 2])
    num_batches = -(-num_images // batch_size)
    return (places + batch_size * torch.arange(num_batches)[:, None]) % num_images


def with_other_neighbours(images: Tensor) -> Rearranged:
    """Every image moves p batches on, where p is its place: the place stays, the companions change.

    Takes what `consecutive` gives: there no image ends up in a batch of the same images as before.
    """
    num_batches, batch_size = images.shape
    places = torch.arange(batch_size)
    batches = (torch.arange(num_batches)[:, None] + places) % num_batches
    moved_to = batches * batch_size + places
    return Rearranged(_put(images, moved_to), moved_to)


def at_other_places(images: Tensor, seed: int) -> Rearranged:
    """The companions stay, and every image moves to another place, the same way in every batch."""
    num_batches, batch_size = images.shape
    # one cycle through all places in random order, so that not one image stays where it is
    cycle = torch.randperm(batch_size, generator=torch.Generator().manual_seed(seed))
    places = torch.empty_like(cycle)
    places[cycle] = cycle.roll(1)
    moved_to = torch.arange(num_batches)[:, None] * batch_size + places
    return Rearranged(_put(images, moved_to), moved_to)


def _put(images: Tensor, moved_to: Tensor) -> Tensor:
    moved = torch.empty_like(images)
    moved.view(-1)[moved_to.view(-1)] = images.view(-1)
    return moved
