"""The average of several checkpoints of one network: of their weights, and of what BatchNorm keeps.

Weights are averaged in float64 and rounded once, to the type that they have in the first checkpoint. Running
statistics are not weights: the average of several networks has other activations than any of them, so only
statistics measured on images are its own. Where there are no images, `pooled` at least describes the mixture
of what the networks saw: its variance has the spread between their means in it, which an average of variances
leaves out.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

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
        first = opened[0]
        means = _running_statistics(first)
        statistics: dict[Combination, dict[str, Tensor]] = {how: {} for how in COMBINATIONS}
        for mean_name, var_name in means.items():
            found = _combined(opened, weighed, mean_name, var_name)
            for how in COMBINATIONS:
                statistics[how] |= found[how]
        skipped = {*means, *means.values()}
        weights, num_averaged = {}, 0
        for name, stored in first.tensors.items():
            if name in skipped:
                continue
            if stored.dtype.is_floating_point or stored.dtype.is_complex:
                weights[name] = _averaged(opened, weighed, name)
                num_averaged += 1
            else:
                weights[name] = _read(stored)
    return AverageState(weights, num_averaged, statistics, weighed)


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


class _Weighed(NamedTuple):
    values: Tensor  # float64
    share: float


def _weighed(checkpoints: Sequence[OpenCheckpoint], shares: Sequence[float], name: str) -> Iterator[_Weighed]:
    """Each checkpoint's values that count; NaN is refused, since it would be everywhere afterwards."""
    for checkpoint, share in zip(checkpoints, shares, strict=True):
        with named(checkpoint.source):
            values = _read(checkpoint.tensors[name])
            if bool(values.isnan().any()):
                raise NotAveragedError(f"{name} holds NaN; leave this checkpoint out")
        if share:
            wide = torch.complex128 if values.is_complex() else torch.float64
            yield _Weighed(values.to(wide), share)


def _averaged(checkpoints: Sequence[OpenCheckpoint], shares: Sequence[float], name: str) -> Tensor:
    total: Tensor | None = None
    equal: Tensor | None = None
    for values, share in _weighed(checkpoints, shares, name):
        if total is None:
            total, equal = values * share, values
        else:
            total += values * share
            # what is the same in all stays so to the bit, and an infinity is no infinity minus itself
            equal = equal if equal is not None and torch.equal(equal, values) else None
    assert total is not None  # one share is above 0
    result = total if equal is None else equal
    return result.to(checkpoints[0].tensors[name].dtype)


def _combined(
    checkpoints: Sequence[OpenCheckpoint], shares: Sequence[float], mean_name: str, var_name: str
) -> dict[Combination, dict[str, Tensor]]:
    """Running mean and variance of one layer, in the three ways; (C,) each."""
    means = list(_weighed(checkpoints, shares, mean_name))
    variances = list(_weighed(checkpoints, shares, var_name))
    mean = sum((values * share for values, share in means), torch.zeros(()))
    average = sum((values * share for values, share in variances), torch.zeros(()))
    between = sum(((values - mean).square() * share for values, share in means), torch.zeros(()))
    first = {name: _read(checkpoints[0].tensors[name]) for name in (mean_name, var_name)}

    def rounded(mean: Tensor, var: Tensor) -> dict[str, Tensor]:
        return {name: values.to(first[name].dtype) for name, values in ((mean_name, mean), (var_name, var))}

    return {"first": first, "average": rounded(mean, average), "pooled": rounded(mean, average + between)}
