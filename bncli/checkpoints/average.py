"""The average of several checkpoints of one network: of their weights, and of what BatchNorm keeps.

Weights are averaged in float64 and rounded once, to the type that they have in the first checkpoint. Running
statistics are not weights: the average of several networks has other activations than any of them, so only
statistics measured on images are its own. Where there are no images, `pooled` at least describes the mixture
of what the networks saw: its variance has the spread between their means in it, which an average of variances
leaves out.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bncli.batchnorm.state_dict import batch_norm_keys
from bncli.checkpoints.any_content import named
from bncli.checkpoints.any_file import OpenCheckpoint, open_checkpoint
from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.stored_tensor import StoredTensor

Combination = Literal["first", "average", "pooled"]  # of running statistics, without images
COMBINATIONS: tuple[Combination, ...] = ("first", "average", "pooled")


class NotAveragedError(UnreadableFileError):
    """Checkpoints of different networks, or one with a number that is none."""


@dataclass(frozen=True, eq=False)
class AverageState:
    """An averaged state dict, in the first checkpoint's names and types, on the CPU."""

    weights: dict[str, Tensor]  # all tensors but running means and variances
    num_averaged: int  # of these; the others, whole numbers such as counters, are those of the first
    statistics: dict[Combination, dict[str, Tensor]]  # running means and variances, in three ways
    shares: tuple[float, ...]  # of each checkpoint; their sum is 1

    def with_statistics(self, how: Combination) -> dict[str, Tensor]:
        """The whole state dict; the order of the names is not that of the file."""
        return {**self.weights, **self.statistics[how]}


def average_checkpoints(
    sources: Sequence[str | Path],
    *,
    shares: Sequence[float] | None = None,
    key: str | None = None,
) -> AverageState:
    """Average checkpoints of one network, of any kind that `open_checkpoint` reads; nothing is executed.

    `shares` has a weight of 0 or more for each; without it all count alike. `key` says where the state dict
    lies in each of them. One tensor of all checkpoints is in memory at a time, beside the result.

    Raises:
        ValueError: for no checkpoints, another number of shares, a negative share, or shares of sum 0.
        CheckpointError: naming the file that cannot be read, is of another network, or holds a NaN.
    """
    weighed = _normalised(shares if shares is not None else [1.0] * len(sources), len(sources))
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(source, key)) for source in sources]
        _check_one_network(opened)
        averaging = Averaging(opened[0])
        for name in averaging.names:
            for checkpoint, share in zip(opened, weighed, strict=True):
                with named(checkpoint.source):
                    averaging.add_tensor(name, _read(checkpoint.tensors[name]), share)
            averaging.finish(name)
    return averaging.state(weighed)


def read_tensors(source: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """All tensors of one checkpoint, by name. Raises CheckpointError where it cannot be read."""
    with open_checkpoint(source, key) as opened, named(opened.source):
        return {name: _read(stored) for name, stored in opened.tensors.items()}


class Averaging:
    """An average that checkpoints are added to, one after the other: their sum is in memory, in float64."""

    def __init__(self, first: OpenCheckpoint) -> None:
        self._pairs = _running_statistics(first)
        self._means = {name: _Mean() for name in first.tensors}
        self._dtypes = {name: stored.dtype for name, stored in first.tensors.items()}
        self._weights: dict[str, Tensor] = {}  # that are finished
        self._first = {
            name: _read(stored)
            for name, stored in first.tensors.items()
            if name in self._statistics or not _is_averaged(stored.dtype)
        }

    @classmethod
    def like(cls, first: str | Path, key: str | None) -> "Averaging":
        """Nothing yet, of the network in a file; its whole numbers and statistics are those of the first."""
        with open_checkpoint(first, key) as opened, named(opened.source):
            return cls(opened)

    def copy(self) -> "Averaging":
        """Another one, to which something else is added."""
        other = copy.copy(self)
        other._means = {name: mean.copy() for name, mean in self._means.items()}
        return other

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors."""
        return tuple(self._means)

    @property
    def _statistics(self) -> set[str]:
        return {*self._pairs, *self._pairs.values()}

    def add(self, source: str | Path, tensors: Mapping[str, Tensor], share: float) -> None:
        """Add a checkpoint; the shares need not sum to 1. Raises CheckpointError, naming it, for a NaN."""
        with named(str(source)):
            for name in self._means:
                self.add_tensor(name, tensors[name], share)

    def add_tensor(self, name: str, values: Tensor, share: float) -> None:
        """Add one tensor of a checkpoint. Raises NotAveragedError for a NaN: it would be everywhere then."""
        if not _is_averaged(values.dtype):
            return
        if bool(values.isnan().any()):
            raise NotAveragedError(f"{name} holds NaN; leave this checkpoint out")
        if share:
            self._means[name].add(values, share, spreads=name in self._pairs)

    def finish(self, name: str) -> None:
        """Round a tensor to which nothing more is added, and forget its sum."""
        if name not in self._first:
            self._weights[name] = self._means[name].rounded(self._dtypes[name])
            self._means[name] = _Mean()

    def state(self, shares: Sequence[float]) -> AverageState:
        """The average of what was added by `shares`, of which some may be 0."""
        weights, num_averaged = {}, 0
        for name, mean in self._means.items():
            if name in self._statistics:
                continue
            if name in self._first:
                weights[name] = self._first[name]
            else:
                finished = self._weights.get(name)
                weights[name] = mean.rounded(self._dtypes[name]) if finished is None else finished
                num_averaged += 1
        found: dict[Combination, dict[str, Tensor]] = {how: {} for how in COMBINATIONS}
        for mean_name, var_name in self._pairs.items():
            mean, var = self._means[mean_name], self._means[var_name]
            rounded = {name: self._means[name].rounded(self._dtypes[name]) for name in (mean_name, var_name)}
            found["first"] |= {name: self._first[name] for name in rounded}
            found["average"] |= rounded
            pooled = (var.value + mean.variance).to(self._dtypes[var_name])
            found["pooled"] |= {**rounded, var_name: pooled}
        return AverageState(weights, num_averaged, found, _normalised(shares, len(shares)))


def _is_averaged(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


class _Mean:
    """A weighted mean in float64 of tensors that are added one after the other, and their variance around it.

    By the updates of West (1979), which add differences: what is equal in all keeps its bits.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None  # of distances from the mean; None: not wanted, or one tensor

    def copy(self) -> "_Mean":
        return copy.copy(self)  # tensors are replaced, never changed

    def add(self, values: Tensor, share: float, *, spreads: bool) -> None:
        values = values.to(torch.complex128 if values.is_complex() else torch.float64)
        self._total += share
        if self._mean is None:
            self._mean = values
            return
        part = share / self._total
        step = values - self._mean
        step[values == self._mean] = 0  # an infinity is no infinity minus itself
        if spreads:
            added = step.square() * (share * (1 - part))
            self._squares = added if self._squares is None else self._squares + added
        self._mean = self._mean + step * part

    @property
    def value(self) -> Tensor:
        """In float64."""
        assert self._mean is not None  # one share is above 0
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Between what was added, in float64."""
        return torch.zeros_like(self.value) if self._squares is None else self._squares / self._total

    def rounded(self, dtype: torch.dtype) -> Tensor:
        return self.value.to(dtype)


def check_one_network(sources: Sequence[str | Path], key: str | None = None) -> None:
    """Raise CheckpointError, naming the file, unless all hold tensors of the same names and shapes."""
    with ExitStack() as stack:
        _check_one_network([stack.enter_context(open_checkpoint(source, key)) for source in sources])


def _check_one_network(opened: Sequence[OpenCheckpoint]) -> None:
    for other in opened[1:]:
        with named(other.source):
            _check_alike(opened[0], other)


def _normalised(shares: Sequence[float], number: int) -> tuple[float, ...]:
    if not number or len(shares) != number:
        raise ValueError(f"{len(shares)} shares for {number} checkpoints")
    total = sum(shares)
    if min(shares) < 0 or not 0 < total < float("inf"):
        raise ValueError("a share is a number of 0 or more, and one of them is above 0")
    return tuple(share / total for share in shares)


def _check_alike(first: OpenCheckpoint, other: OpenCheckpoint) -> None:
    """Raise NotAveragedError unless both have the same names with the same shapes."""
    for name in dict.fromkeys([*first.tensors, *other.tensors]):
        for one, two in ((first, other), (other, first)):
            if name not in one.tensors:
                raise NotAveragedError(
                    f"{name} is in {two.source} only; only checkpoints of one network are averaged"
                )
        shapes = [checkpoint.tensors[name].shape for checkpoint in (first, other)]
        if shapes[0] != shapes[1]:
            raise NotAveragedError(
                f"{name} has shape {shapes[1]}, and {shapes[0]} in {first.source}; only checkpoints of one"
                " network are averaged"
            )


def _running_statistics(checkpoint: OpenCheckpoint) -> dict[str, str]:
    """Each layer's name of its running mean, with that of its running variance."""
    found = {}
    for layer in checkpoint.layer_names:
        keys = batch_norm_keys(checkpoint.tensors, layer)
        if "running_mean" in keys and "running_var" in keys:
            found[keys["running_mean"]] = keys["running_var"]
    return found


def _read(stored: StoredTensor) -> Tensor:
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    stored.copy_into(tensor)
    return tensor
