"""The same images computed twice, and which row of one computation belongs to which of the other.

The batches of one size put the same images in another company, or at another place. A batch is a row of an
index matrix (num_batches, batch_size): which image stands at which place. Two matrices together with where
each image went test one claim and no other: one that keeps places and changes companions, one that keeps
companions and changes places.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from bncli.determinism.difference import Difference
from bncli.determinism.layer_trace import Seat
from bncli.forward import forward


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


@dataclass(frozen=True)
class Pass:
    """One computation of batches of one size."""

    index: Tensor  # (num_batches, batch_size) int64, which image stands where
    logits: Tensor  # (num_batches * batch_size, num_classes), on the CPU, in their own dtype

    @classmethod
    def of(
        cls, model: nn.Module, images: Tensor, index: Tensor, computed: Callable[[int], None] = lambda _: None
    ) -> "Pass":
        """Compute images (N, ...) in the batches of `index`, in the model's mode.

        `computed` is told the size of each batch when it is done.
        """
        logits = []
        for batch in index:
            logits.append(forward(model, images[batch]).cpu())
            computed(len(batch))
        return cls(index, torch.cat(logits))

    def seat(self, images: Tensor, row: int) -> Seat:
        """The batch and the place in it that a row of the logits comes from."""
        batch, place = divmod(row, self.index.shape[1])
        return Seat(images[self.index[batch]], place)


@dataclass(frozen=True)
class Pairing:
    """The same images in two passes, whose logits the claim says are the same."""

    first: Pass
    second: Pass
    partner: Tensor  # for every row of `first`, the row of `second` with the same image
    num_images: int  # those with higher numbers only keep company

    @property
    def rows(self) -> Tensor:
        """The rows of `first` to compare, (R,)."""
        return (self.first.index.flatten() < self.num_images).nonzero().squeeze(1)

    @property
    def images(self) -> Tensor:
        """Which image each compared row is, (R,)."""
        return self.first.index.flatten()[self.rows]

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        """Both logits (R, num_classes) of the compared rows."""
        return self.first.logits[self.rows], self.second.logits[self.partner.flatten()[self.rows]]

    def seats(self, images: Tensor, index: int) -> tuple[Seat, Seat]:
        """Where the image of a compared row stands in both passes."""
        row = int(self.rows[index])
        return self.first.seat(images, row), self.second.seat(images, int(self.partner.flatten()[row]))


def differ(pairings: Sequence[Pairing]) -> tuple[Difference, int]:
    """All pairs of rows in one comparison, and how many images got another prediction."""
    first, second = zip(*(pairing.logits for pairing in pairings), strict=True)
    difference = Difference.between(torch.cat(first), torch.cat(second))
    flipped = torch.cat([pairing.images for pairing in pairings])[difference.flips]
    return difference, len(flipped.unique())


@dataclass(frozen=True)
class Pairings:
    """What each claim is judged by."""

    alone: Pass  # every image in a batch of its own, in order: its row is its number
    repeat: list[Pairing] = field(default_factory=list)
    neighbours: list[Pairing] = field(default_factory=list)
    position: list[Pairing] = field(default_factory=list)
    # by size: against alone, in the given order and with the places shuffled
    batch_size: dict[int, tuple[Pairing, Pairing]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        images: Tensor,
        batch_sizes: Sequence[int],
        *,
        num_images: int,
        seed: int,
        computed: Callable[[int], None] = lambda _: None,
    ) -> "Pairings":
        """Compute images (N, ...) in all arrangements, in the model's mode; compare `num_images` of them."""
        pair = partial(Pairing, num_images=num_images)
        compute = partial(Pass.of, model, images, computed=computed)
        alone = compute(one_by_one(len(images)))
        found = cls(alone)
        found.repeat.append(pair(alone, compute(alone.index), alone.index))
        for size in sorted(set(batch_sizes)):
            if size == 1:
                found.batch_size[1] = (found.repeat[0], found.repeat[0])
                continue
            given = compute(consecutive(len(images), size))
            again = compute(given.index)
            found.repeat.append(pair(given, again, torch.arange(given.index.numel())))
            mixed = with_other_neighbours(given.index)
            found.neighbours.append(pair(given, compute(mixed.images), mixed.moved_to))
            moved = at_other_places(given.index, seed)
            shuffled = compute(moved.images)
            found.position.append(pair(given, shuffled, moved.moved_to))
            found.batch_size[size] = pair(given, alone, given.index), pair(shuffled, alone, shuffled.index)
        return found


def num_computed(num_images: int, batch_sizes: Sequence[int]) -> int:
    """How many images a certificate computes in all, one as often as it is computed."""
    total = 3 * num_images  # alone: twice in eval mode, once in train mode
    for size in set(batch_sizes) - {1}:
        in_train_mode = -(-num_images // size) * size
        total += 4 * consecutive(num_images, size).numel() + in_train_mode
    return total
