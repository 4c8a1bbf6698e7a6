"""Moments of many batches, merged in one fixed order: any shards give the bits of one process.

Merging floating-point moments is not associative, so the order must not depend on who merges. Batches
carry their index in the whole data set and are leaves of a binary tree in which node (level, i) holds the
batches from i * 2**level up to (i + 1) * 2**level. A parent is always its left child merged with its right
one, whoever computed them. The total is the same function of the same batches, however they were divided.

Siblings are merged only to save memory: at most `MAX_NODES` stay where batches come in runs. What is left
serves as clusters for the standard errors.
"""

import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

from bncli.batchnorm.population.moments import Moments

MAX_NODES = 128
_NUM_GROUPS = 64  # at most, for the standard errors


class BatchTree:
    """One layer's moments, by batch. Holds CPU tensors."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int], int] = {}  # the rows in which they are kept
        self._kept = _Pages()
        self._num_indices = 0  # the highest index plus 1
        self.num_batches = 0

    def __repr__(self) -> str:
        """How many batches it holds."""
        return f"BatchTree({self.num_batches} batches)"

    def add(self, index: int, moments: Moments) -> None:
        """Put in the batch of that index in the whole data set. Raises ValueError if it is there."""
        self._insert({(0, index): moments}, index + 1, 1)

    def merge(self, other: "BatchTree") -> "BatchTree":
        """Both shards' batches. Raises ValueError if one batch is in both."""
        both = BatchTree()
        for tree in (self, other):
            both._insert(tree._moments(), tree._num_indices, tree.num_batches)
        return both

    def total(self) -> Moments:
        """The moments of all batches. Raises ValueError without any."""
        if not self._nodes:
            raise ValueError("no batch was added")
        return _merged_up_to(self._num_indices.bit_length(), self._moments())[0]

    def standard_errors(self) -> tuple[Tensor, Tensor]:
        """Standard errors (C,) of the mean and of the (biased) variance; NaN with fewer than two groups.

        Values of one image, and images of one batch, are not independent. So the at most 64 runs of
        consecutive batches count as clusters, and the estimators are those of ratios of cluster totals,
        linearised (Cochran 1977, section 6.3): with G groups of n_g values, mean m_g and variance v_g,

            se(mean)**2 = G / (G - 1) * sum_g (n_g (m_g - mean))**2 / n**2
            se(var)**2  = G / (G - 1) * sum_g (n_g (v_g + (m_g - mean)**2 - var))**2 / n**2

        It takes the batches for a random sample. With few groups it is rough.
        """
        total = self.total()
        level = max(0, (self._num_indices - 1).bit_length() - (_NUM_GROUPS.bit_length() - 1))
        groups = _merged_up_to(level, self._moments())
        num_groups = len(groups)
        if num_groups < 2:
            unknown = torch.full_like(total.mean, torch.nan)
            return unknown, unknown.clone()
        counts = torch.tensor([group.count for group in groups], dtype=torch.float64)[:, None]
        shifts = torch.stack([group.mean for group in groups]) - total.mean  # (G, C)
        variances = torch.stack([group.variance() for group in groups])
        influences = (shifts, variances + shifts.square() - total.variance())
        factor = num_groups / (num_groups - 1)
        mean, var = ((factor * (counts * one).square().sum(0)).sqrt() / total.count for one in influences)
        return mean, var

    def _insert(self, nodes: dict[tuple[int, int], Moments], num_indices: int, num_batches: int) -> None:
        for level, index in nodes:
            if _overlaps(level, index, self._nodes):
                raise ValueError(f"batch {index << level} was measured twice")
        self._nodes |= {key: self._kept.put(moments) for key, moments in nodes.items()}
        self._num_indices = max(self._num_indices, num_indices)
        self.num_batches += num_batches
        level = 0
        while len(self._nodes) > MAX_NODES and level < self._num_indices.bit_length():
            self._merge_pairs(level)
            level += 1

    def _moments(self) -> dict[tuple[int, int], Moments]:
        return {key: self._kept.copy_of(row) for key, row in self._nodes.items()}

    def _merge_pairs(self, level: int) -> None:
        """Merge every two siblings of a level of which both are there."""
        for lower, index in sorted(self._nodes):
            if lower == level and index % 2 == 0 and (level, index + 1) in self._nodes:
                left, right = (self._kept.take(self._nodes.pop((level, one))) for one in (index, index + 1))
                self._nodes[level + 1, index // 2] = self._kept.put(left.merge(right))


class _Pages:
    """Moments of one layer by row, in pages outside the C library's heap.

    They stay until the pass ends, and are made between the network's activations. As tensors of their own
    each would keep a gap there from growing together again, too small for the next batch's activations, and
    the heap would grow with the number of batches (ResNet-18, 64x64 pixels in batches of 256: by 8 MiB of 530
    from 1,000 to 6,000 images, where it now grows by 1).
    Pages that were not written to take no memory.
    """

    def __init__(self) -> None:
        self._pages: list[Tensor] = []  # (MAX_NODES + 1, 2, C) float64 each: means and m2
        self._counts: list[int] = []  # by row
        self._free: list[int] = []  # rows

    def put(self, moments: Moments) -> int:
        """Keep a copy; gives its row."""
        if not self._free:
            self._add_page(len(moments.mean))
        row = self._free.pop()
        self._counts[row] = moments.count
        mean, m2 = self._row(row)
        mean.copy_(moments.mean)
        m2.copy_(moments.m2)
        return row

    def copy_of(self, row: int) -> Moments:
        """What is kept there."""
        return Moments(self._counts[row], *self._row(row).clone())

    def take(self, row: int) -> Moments:
        """The same, and the row is free for others."""
        self._free.append(row)
        return self.copy_of(row)

    def _row(self, row: int) -> Tensor:
        page, index = divmod(row, MAX_NODES + 1)
        return self._pages[page][index]

    def _add_page(self, num_channels: int) -> None:
        num_rows, start = MAX_NODES + 1, len(self._counts)
        memory = mmap.mmap(-1, max(1, num_rows * 2 * num_channels * 8))
        values = torch.frombuffer(memory, dtype=torch.float64, count=num_rows * 2 * num_channels)
        self._pages.append(values.view(num_rows, 2, num_channels))
        self._counts += [0] * num_rows
        self._free += reversed(range(start, start + num_rows))  # from the first page on


def _overlaps(level: int, index: int, nodes: Iterable[tuple[int, int]]) -> bool:
    """Whether a batch of this node is in one of the others."""
    for other_level, other_index in nodes:
        common = max(level, other_level)
        if index >> (common - level) == other_index >> (common - other_level):
            return True
    return False


def _merged_up_to(top: int, nodes: dict[tuple[int, int], Moments]) -> list[Moments]:
    """The nodes of level `top` in order; a node without a sibling rises as it is."""
    nodes = dict(nodes)
    for level in range(top):
        for key in sorted(key for key in nodes if key[0] == level):
            moments = nodes.pop(key)
            parent = (level + 1, key[1] // 2)
            nodes[parent] = nodes[parent].merge(moments) if parent in nodes else moments
    return [nodes[key] for key in sorted(nodes)]
