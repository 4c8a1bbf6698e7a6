"""One pass over all batches: the moments of chosen layers, batch by batch, by one process or by several.

Ranks exchange the moments of every batch and put them into the same tree in the same order, each for itself:
the bits are those of one process that has all batches. They meet now and then and not only at the end, so
that moments do not pile up and an error ends all of them soon; a rank that has no batches left goes on
meeting the others until all are done.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batches import Batches, SameImages, inputs_of
from bncli.batchnorm.distance import rms
from bncli.batchnorm.population.hooks import recording
from bncli.batchnorm.population.merge_tree import BatchTree
from bncli.batchnorm.population.moments import Moments
from bncli.distributed.ranks import Ranks
from bncli.errors import BncliError, DataError

MIN_BATCHES = 8  # before a standard error from so few clusters is trusted to end a pass
_MEET_EVERY = 16  # batches of a rank: ResNet-50 has 0.4 MB of moments for each

# (pass from 1, passes in all as far as known, images done in this pass)
PassProgress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Share:
    """Which batches of the whole data set this process has: every `step`-th from the `first` on."""

    ranks: Ranks = field(default_factory=Ranks)
    first: int = 0
    step: int = 1

    @classmethod
    def of(cls, ranks: Ranks, first_batch: int | None) -> "Share":
        """Batches that follow each other from `first_batch` on; without it those that are dealt in turn."""
        if first_batch is None:
            return cls(ranks, ranks.rank, ranks.size)
        return cls(ranks, first_batch, 1)

    def index(self, number: int) -> int:
        """In the whole data set, of this process's batch."""
        return self.first + number * self.step

    def num_own(self, num_batches: int | None) -> int | None:
        """How many of the first so many batches this process has; None: all that it has."""
        return None if num_batches is None else len(range(self.first, num_batches, self.step))


WHOLE = Share()


@dataclass(frozen=True, eq=False)
class MeasuredPass:
    """What one pass saw. A layer that saw no input has no tree."""

    trees: dict[str, BatchTree]
    num_images: int
    num_batches: int
    stopped_early: bool  # because every standard error was below the tolerance
    num_own_images: int  # of this process


def measure_pass(
    model: nn.Module,
    batches: Batches,
    layers: Mapping[str, _BatchNorm],
    *,
    by_batch: Collection[str] = (),
    until: Mapping[str, int] | None = None,
    num_batches: int | None = None,
    tolerance: float | None = None,
    share: Share = WHOLE,
    same_images: SameImages | None = None,
    forward: Callable[[Tensor], object] | None = None,
    progress: Callable[[int], None] | None = None,
) -> MeasuredPass:
    """Run the model over the batches as `recording` does, and keep the moments of every layer.

    `num_batches` limits the pass. `share` says which batches of the whole data set these are; where others
    have the rest, what is found is of all batches, and `progress` counts the images of all as far as they are
    known. With `until` ranks exchange moments only at the end: then those of a rank that begins the pass
    anew, after an error, count once.

    Raises DataError without images, or where two ranks have the same ones.
    """
    tally = _Tally(layers, tolerance, share)
    own: list[_Leaf] = []
    num_own_images = 0
    with recording(model, layers, by_batch=by_batch, until=until, forward=forward) as record:
        for number, inputs in enumerate(inputs_of(batches, share.num_own(num_batches))):
            own.append(_Leaf(share.index(number), len(inputs), record(inputs)))
            num_own_images += len(inputs)
            if same_images is not None:
                same_images.see(inputs)
            if progress is not None:
                progress(tally.num_images_so_far(num_own_images, own_batches=number + 1))
            if tally.meets_after(number):
                given = [] if until is not None and share.ranks.size > 1 else own
                tally.meet(given, num_own_images, is_done=False)
                own = own if given is not own else []
                if tally.stopped:
                    break
    while not tally.all_done:
        tally.meet(own, num_own_images, is_done=True)
        own = []
    if progress is not None and share.ranks.size > 1:
        progress(tally.num_images)
    if tally.num_images == 0:
        raise DataError("there is nothing to measure: the batches hold no images")
    if same_images is not None:
        same_images.end_pass()
    return MeasuredPass(tally.trees, tally.num_images, tally.num_batches, tally.stopped, num_own_images)


@dataclass(frozen=True, eq=False)
class _Leaf:
    """One batch."""

    index: int  # in the whole data set
    num_images: int
    moments: dict[str, Moments]

    def __getstate__(self) -> tuple[int, int, dict[str, tuple[int, npt.NDArray[Any]]]]:
        """For another rank: numpy arrays travel a hundred times as fast as so small tensors."""
        arrays = {
            name: (one.count, torch.stack([one.mean, one.m2]).numpy()) for name, one in self.moments.items()
        }
        return self.index, self.num_images, arrays

    def __setstate__(self, state: tuple[int, int, dict[str, tuple[int, npt.NDArray[Any]]]]) -> None:
        index, num_images, arrays = state
        moments = {name: Moments(count, *torch.from_numpy(array)) for name, (count, array) in arrays.items()}
        self.__dict__.update(index=index, num_images=num_images, moments=moments)


@dataclass(frozen=True)
class _Report:
    """What a rank tells the others where they meet."""

    leaves: list[_Leaf]
    num_images: int  # of this rank so far
    is_done: bool


class _Tally:
    """The batches of all ranks so far, in order, the same on every rank."""

    def __init__(self, layers: Mapping[str, _BatchNorm], tolerance: float | None, share: Share) -> None:
        self.trees: dict[str, BatchTree] = {}
        self.num_images = self.num_batches = 0
        self._num_images_of_others = 0  # when the ranks met last
        self.stopped = self.all_done = False
        self._layers, self._tolerance, self._share = layers, tolerance, share
        self._first: dict[int, _Leaf] = {}  # by rank

    def meets_after(self, number: int) -> bool:
        """Whether the ranks meet after their batches of this number."""
        size = self._share.ranks.size
        if size == 1 or (number + 1) % _MEET_EVERY == 0:
            return True
        return self._tolerance is not None and any(
            map(_is_due, range(number * size + 1, (number + 1) * size + 1))
        )

    def num_images_so_far(self, num_own: int, own_batches: int) -> int:
        """Of all ranks: where batches are dealt in turn, about as many of each other one as of this one."""
        known = num_own + self._num_images_of_others
        if self._share.step != self._share.ranks.size:
            return known
        return max(known, self._share.ranks.images_so_far(num_own, own_batches, num_own // own_batches))

    def meet(self, leaves: list[_Leaf], num_images: int, *, is_done: bool) -> None:
        """Take in these batches of this rank, and those of all others."""
        ranks = self._share.ranks
        reports = ranks.gather(_Report(leaves, num_images, is_done))
        self.all_done = all(one.is_done for one in reports)
        self._num_images_of_others = sum(one.num_images for one in reports) - num_images
        self._refuse_same_parts(reports)
        for leaf in sorted((leaf for one in reports for leaf in one.leaves), key=lambda leaf: leaf.index):
            self._add(leaf)
            if self.stopped:
                break
        # processors that round differently
        if self._tolerance is not None and len(set(ranks.gather(self.num_batches))) > 1:
            raise BncliError("the ranks found different standard errors: leave the tolerance out")
        self.all_done |= self.stopped

    def _add(self, leaf: _Leaf) -> None:
        for name, moments in leaf.moments.items():
            try:
                self.trees.setdefault(name, BatchTree()).add(leaf.index, moments)
            except ValueError as error:
                raise DataError(f"{error}: two ranks have it; each needs a first_batch of its own") from None
        self.num_batches += 1
        self.num_images += leaf.num_images
        if self._tolerance is not None and _is_due(self.num_batches):
            self.stopped = _worst_error(self.trees, self._layers) <= self._tolerance

    def _refuse_same_parts(self, reports: Sequence[_Report]) -> None:
        """Raise DataError if two ranks begin with the same batch, as where all were given all images."""
        for rank, report in enumerate(reports):
            if rank in self._first or not report.leaves:
                continue
            leaf = self._first[rank] = report.leaves[0]
            for other, first in self._first.items():
                if other != rank and _same_values(first.moments, leaf.moments):
                    raise DataError(
                        f"ranks {other} and {rank} have the same images: give each its own part, as"
                        " DealtBatches and DistributedSampler do"
                    )


def _same_values(first: Mapping[str, Moments], second: Mapping[str, Moments]) -> bool:
    """Whether two batches have the same moments, to the last bit, and are not constant."""
    if not first or first.keys() != second.keys():
        return False
    pairs = [(first[name], second[name]) for name in first]
    same = all(torch.equal(a.mean, b.mean) and torch.equal(a.m2, b.m2) for a, b in pairs)
    return same and any(bool((one.m2 > 0).any()) for one in first.values())


def _is_due(num_batches: int) -> bool:
    """Whether the errors are looked at after so many batches: ever more rarely, so that it costs little."""
    return num_batches >= MIN_BATCHES and num_batches % max(1, num_batches // MIN_BATCHES) == 0


def _worst_error(trees: Mapping[str, BatchTree], layers: Mapping[str, _BatchNorm]) -> float:
    """The largest standard error of a layer's mean: RMS over channels, in deviations."""
    errors = []
    for name, tree in trees.items():
        deviations = (tree.total().variance() + layers[name].eps).sqrt()
        errors.append(rms(tree.standard_errors()[0] / deviations))
    return float(torch.tensor(errors).max()) if errors else float("inf")
