"""Which part of a batch a process computes: all of it, or some of the parts that the batch is cut into.

A batch is cut into the same parts whoever computes them, and each part is one batch to BatchNorm. So what is
learned does not depend on the number of processes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """The parts of one batch that one process computes, which are neighbours."""

    batch_size: int  # images of the whole batch
    num_parts: int  # of the whole batch
    first: int  # the number of the first own part, from 0
    sizes: tuple[int, ...]  # images of the own parts; none where there are fewer parts than processes
    rows: slice  # the own images in the batch


def share_of(batch_size: int, num_parts: int, rank: int = 0, num_ranks: int = 1) -> Share:
    """The share of process `rank` in a batch that is cut into parts as `bncli.data.micro_batches` cuts it."""
    sizes, counts = split_evenly(batch_size, num_parts), split_evenly(num_parts, num_ranks)
    first = sum(counts[:rank])
    last = first + counts[rank]
    rows = slice(sum(sizes[:first]), sum(sizes[:last]))
    return Share(batch_size, num_parts, first, sizes[first:last], rows)


def split_evenly(total: int, count: int) -> tuple[int, ...]:
    """As `Tensor.tensor_split` does: equal to within one, the larger ones first."""
    size, rest = divmod(total, count)
    return (size + 1,) * rest + (size,) * (count - rest)
