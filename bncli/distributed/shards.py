"""Which batches of a data set each rank has, so that every image counts once.

`DealtBatches` deals the batches of one process: number k goes to rank k modulo the number of ranks, and none
is repeated. PyTorch's DistributedSampler deals images instead, and repeats the first ones until every rank
has as many: those repeats are found here and left out.
"""

from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from bncli.batches import Batches, GetTensor, inputs_of, labelled, read_with
from bncli.distributed.ranks import Ranks
from bncli.errors import DataError
from bncli.indexed import in_order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Batch = TypeVar("Batch", bound=tuple[Tensor, ...])


class DealtBatches(Sampler[list[int]]):
    """A batch sampler for this rank: `DataLoader(dataset, batch_sampler=DealtBatches(dataset, 256, group))`.

    All ranks together have the batches that one process has with `DataLoader(dataset, batch_size=256)`, each
    of them once. A rank may have one batch fewer than another, or none.
    """

    def __init__(self, dataset: Sized, batch_size: int, group: "ProcessGroup | None" = None) -> None:
        ranks = Ranks.of(group)
        self._batches = list(in_order(len(dataset), batch_size))[ranks.rank :: ranks.size]

    def __iter__(self) -> Iterator[list[int]]:
        """The numbers of the images of each batch."""
        return map(list, self._batches)

    def __len__(self) -> int:
        """The number of batches of this rank."""
        return len(self._batches)


def divided(batches: Batches, ranks: Ranks) -> Batches:
    """This rank's part of a DataLoader that gives all images to each rank, in order or at random.

    A DistributedSampler divides it. All else is taken as it is: each rank's own part already.
    """
    loader: Any = batches() if callable(batches) else batches
    if not isinstance(loader, DataLoader):
        return batches
    if loader.batch_size is None or type(loader.sampler) not in (RandomSampler, SequentialSampler):
        return loader
    shuffle = isinstance(loader.sampler, RandomSampler)
    return DataLoader(
        loader.dataset,
        loader.batch_size,
        sampler=DistributedSampler(loader.dataset, ranks.size, ranks.rank, shuffle),
        drop_last=loader.drop_last,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def without_repeats(batches: Batches, get_input: GetTensor | None = None) -> Batches:
    """The inputs of batches, without the images that a DistributedSampler repeats to fill up a rank's part.

    Raises DataError for a loader whose images come in another order than its sampler's.
    """
    found, num_own = read_with(batches, get_input), _num_own_images(batches)
    if num_own is None:
        return found
    return lambda: (inputs for (inputs,) in _first_images(zip(inputs_of(found)), num_own))


def labelled_once(
    batches: Batches, get_input: GetTensor | None = None, get_labels: GetTensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass as `bncli.batches.labelled` gives it, without such repeats. Raises DataError as both do."""
    pairs, num_own = labelled(batches, get_input, get_labels), _num_own_images(batches)
    return pairs if num_own is None else _first_images(pairs, num_own)


def _num_own_images(batches: Batches) -> int | None:
    """After how many images a loader's DistributedSampler begins to repeat others; None: it does not."""
    sampler = _distributed_sampler(batches)
    if sampler is None:
        return None
    num_own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    if num_own >= sampler.num_samples:
        return None
    if not getattr(batches, "in_order", True):
        raise DataError(
            "a DataLoader with in_order=False gives images in any order, so those that its DistributedSampler"
            " repeats cannot be told: leave in_order out, or give it batch_sampler=DealtBatches(...)"
        )
    return num_own


def _distributed_sampler(batches: Batches) -> "DistributedSampler[Any] | None":
    if not isinstance(batches, DataLoader):
        return None
    sampler: object = batches.sampler
    if isinstance(batches.batch_sampler, BatchSampler):
        sampler = batches.batch_sampler.sampler
    return sampler if isinstance(sampler, DistributedSampler) else None


def _first_images(batches: Iterable[Batch], num_images: int) -> Iterator[Batch]:
    """Batches of one or more tensors (N, ...) until there are so many images."""
    for batch in batches:
        if num_images <= 0:
            return
        yield tuple(each[:num_images] for each in batch)  # type: ignore[misc]
        num_images -= len(batch[0])
