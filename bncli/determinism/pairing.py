"""The same images computed twice, and which row of one computation belongs to which of the other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from bncli.determinism.arrangement import at_other_places, consecutive, one_by_one, with_other_neighbours
from bncli.determinism.difference import Difference
from bncli.determinism.layer_trace import Seat
from bncli.forward import forward


@dataclass(frozen=True)
class Pass:
    """One computation of batches of one size."""

    index: Tensor  # (num_batches, batch_size) int64, which image stands where
    logits: Tensor  # (num_batches * batch_size, num_classes), on the CPU, in their own dtype

    @classmethod
    def of(cls, model: nn.Module, images: Tensor, index: Tensor) -> "Pass":
        """Compute images (N, ...) in the batches of `index`, in the model's mode."""
        return cls(index, torch.cat([forward(model, images[batch]).cpu() for batch in index]))

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
        cls, model: nn.Module, images: Tensor, batch_sizes: Sequence[int], *, num_images: int, seed: int
    ) -> "Pairings":
        """Compute images (N, ...) in all arrangements, in the model's mode; compare `num_images` of them."""
        pair = partial(Pairing, num_images=num_images)
        alone = Pass.of(model, images, one_by_one(len(images)))
        found = cls(alone)
        found.repeat.append(pair(alone, Pass.of(model, images, alone.index), alone.index))
        for size in sorted(set(batch_sizes)):
            if size == 1:
                found.batch_size[1] = (found.repeat[0], found.repeat[0])
                continue
            given = Pass.of(model, images, consecutive(len(images), size))
            again = Pass.of(model, images, given.index)
            found.repeat.append(pair(given, again, torch.arange(given.index.numel())))
            mixed = with_other_neighbours(given.index)
            found.neighbours.append(pair(given, Pass.of(model, images, mixed.images), mixed.moved_to))
            moved = at_other_places(given.index, seed)
            shuffled = Pass.of(model, images, moved.images)
            found.position.append(pair(given, shuffled, moved.moved_to))
            found.batch_size[size] = pair(given, alone, given.index), pair(shuffled, alone, shuffled.index)
        return found
