"""The files of several processes (ranks) of one training: where their running statistics differ.

Plain DistributedDataParallel gives all ranks the same weights, and each forward pass begins with rank 0's
buffers; after it every rank has the statistics of its own images. What all images together have is their
pool: the mean of the means, and the mean of the variances plus the variance between the means. Averaging
variances, as is often done (timm's `distribute_bn`), loses that last part, and eval mode then scales by too
much.

Each rank counts the same, as in DDP. Unbiased variances are pooled exactly where `values` is given, the
number of values per channel in a rank's batch; without it their n / (n - 1) stays as it is. Running averages
are pooled as they are: what varies between ranks from batch to batch alone averages out in them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bncli.batchnorm.bits import bitwise_equal
from bncli.batchnorm.compare import Contents, ReadableTensor
from bncli.batchnorm.feeding import owner
from bncli.batchnorm.layers import LayerStats, summarize
from bncli.batchnorm.population.moments import Moments, pooled
from bncli.errors import IncomparableError
from bncli.wording import list_names, plural


@dataclass(frozen=True, eq=False)
class PooledLayer:
    """One layer of all ranks; tensors are float64 of shape (C,), on the CPU.

    NaN where a rank's number is none that eval mode can use.
    """

    name: str
    num_batches_tracked: tuple[int | None, ...]  # by rank
    identical: bool  # running_mean and running_var of all ranks, in every bit
    running_mean: Tensor  # of all ranks' images together
    running_var: Tensor  # with the variance between ranks
    averaged_var: Tensor  # without it
    mean_range: Tensor  # from the smallest to the largest mean, in deviations of the pool
    var_ratio: Tensor  # the largest var + eps over the smallest

    @property
    def lost_share(self) -> Tensor:
        """(C,) of the pooled variance that averaging loses, from 0 to 1."""
        return 1 - self.averaged_var / self.running_var

    def to_dict(self, *, channels: bool = False) -> dict[str, Any]:
        """Its entry in the JSON document, and with `channels` the tensors."""
        tensors = {
            "mean_range_in_pooled_deviations": self.mean_range,
            "var_ratio": self.var_ratio,
            "share_lost_by_averaging": self.lost_share,
        }
        pool = {
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "averaged_var": self.averaged_var,
        }
        return {
            "name": self.name,
            "num_features": len(self.running_mean),
            "num_batches_tracked": self.num_batches_tracked,
            "identical": self.identical,
            **{name: summarize(tensor) for name, tensor in tensors.items()},
            **{
                f"pooled_{name}" if name != "averaged_var" else name: summarize(one)
                for name, one in pool.items()
            },
            **({"channels": tensors | pool} if channels else {}),
        }


@dataclass(frozen=True, eq=False)
class RankComparison:
    """All ranks' files against each other, in the order of the first's layers."""

    num_ranks: int
    identical: bool  # every tensor, in every bit
    layers: tuple[PooledLayer, ...]
    not_in_all: tuple[str, ...]  # layers with statistics that a rank has not, or of another size
    other_differences: tuple[str, ...]  # tensors of the first beside running statistics, and those of others
    counts_differ: bool  # num_batches_tracked
    values: float | None  # per channel in a rank's batch, as given

    @property
    def verdict(self) -> str:
        """In words."""
        moved = [layer for layer in self.layers if not layer.identical]
        parts = [f"All {self.num_ranks} ranks hold the same running statistics, in every bit."]
        if moved:
            parts = [
                f"The running statistics of the {self.num_ranks} ranks differ in {len(moved)} of"
                f" {plural(len(self.layers), 'layer')}{self._extremes(moved)}."
            ]
        if self.counts_differ:
            parts.append("They counted different numbers of batches; each rank is given the same weight.")
        if self.other_differences:
            parts.append(
                f"Tensors that are no statistics differ: {list_names(self.other_differences, 3)}. After a"
                " step of DDP all ranks have the same weights: these are not the ranks of one training, or"
                " not of one step."
            )
        return " ".join(parts)

    def _extremes(self, moved: Sequence[PooledLayer]) -> str:
        shift, var = _largest(moved, "mean_range"), _largest(moved, "var_ratio")
        lost = _largest(moved, "lost_share")
        if shift is None or var is None or lost is None:
            return ""
        return (
            f": means by up to {shift[0]:.2g} deviations ({shift[1]}), variances by up to a factor of"
            f" {var[0]:.3g} ({var[1]}). Averaging variances would lose up to {lost[0]:.2%} of one"
            f" ({lost[1]}), and eval mode would scale that channel by"
            f" {1 / math.sqrt(max(1 - lost[0], 1e-300)) - 1:.2%} too much; pooling keeps it"
        )

    def to_dict(self, *, channels: bool = False) -> dict[str, Any]:
        """The JSON document."""
        return {
            "num_ranks": self.num_ranks,
            "identical": self.identical,
            "verdict": self.verdict,
            "values_per_channel": self.values,
            "num_layers": len(self.layers),
            "num_layers_that_differ": sum(not layer.identical for layer in self.layers),
            "layers": [layer.to_dict(channels=channels) for layer in self.layers],
            "not_in_all": self.not_in_all,
            "counts_differ": self.counts_differ,
            "other_differences": self.other_differences,
        }

    def __str__(self) -> str:
        """The verdict."""
        return self.verdict


def compare_ranks(ranks: Sequence[Contents], *, values: float | None = None) -> RankComparison:
    """Compare what several ranks saved, the statistics layer by layer and all else in every bit.

    `values` is the number of values per channel in a rank's batch (images x height x width).

    Raises:
        IncomparableError: when no layer with running statistics is in all of them.
    """
    by_name = [{layer.name: layer for layer in rank.layers() if _has_statistics(layer)} for rank in ranks]
    names = list(dict.fromkeys(name for layers in by_name for name in layers))
    shared = [
        name
        for name in names
        if all(name in layers for layers in by_name)
        and len({layers[name].num_features for layers in by_name}) == 1
    ]
    if not shared:
        raise IncomparableError("no BatchNorm layer of the first is in all others under the same name")
    layers = tuple(pool_layer([one[name] for one in by_name], values=values) for name in shared)
    differing = _differing([rank.tensors for rank in ranks])
    known = set(names)
    others = tuple(name for name in differing if owner(name, known) is None or _is_affine(name))
    return RankComparison(
        num_ranks=len(ranks),
        identical=not differing and all(layer.identical for layer in layers),
        layers=layers,
        not_in_all=tuple(name for name in names if name not in set(shared)),
        other_differences=others,
        counts_differ=any(len(set(layer.num_batches_tracked)) > 1 for layer in layers),
        values=values,
    )


def pool_layer(ranks: Sequence[LayerStats], *, values: float | None = None) -> PooledLayer:
    """One layer as all ranks have it; all have running statistics of the same channels."""
    means = torch.stack([_wide(rank.running_mean) for rank in ranks])  # (ranks, C)
    variances = torch.stack([_wide(rank.running_var) for rank in ranks])
    eps = ranks[0].eps_or_default
    usable = (means.isfinite() & variances.isfinite() & (variances + eps > 0)).all(0)
    means, variances = (values.masked_fill(~usable, torch.nan) for values in (means, variances))
    is_exact = values is not None and ranks[0].convention.variance != "biased"
    count = values if values is not None and is_exact else 1.0
    # the sums of squares that make these variances, of count values or as many as one likes
    sums = variances * (count - 1 if is_exact else count)
    pool = pooled([Moments(count, mean, m2) for mean, m2 in zip(means, sums, strict=True)])  # type: ignore[arg-type]
    pooled_var = pool.variance(unbiased=is_exact)
    spread = variances + eps
    first = ranks[0]
    return PooledLayer(
        name=first.name,
        num_batches_tracked=tuple(rank.num_batches_tracked for rank in ranks),
        identical=all(
            _same(first.running_mean, rank.running_mean) and _same(first.running_var, rank.running_var)
            for rank in ranks[1:]
        ),
        running_mean=pool.mean,
        running_var=pooled_var,
        averaged_var=variances.mean(0),
        mean_range=(means.amax(0) - means.amin(0)) / (pooled_var + eps).sqrt(),
        var_ratio=spread.amax(0) / spread.amin(0),
    )


def _has_statistics(layer: LayerStats) -> bool:
    return layer.running_mean is not None and layer.running_var is not None


def _wide(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.double()


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    return first is not None and second is not None and bitwise_equal(first, second)


def _is_affine(name: str) -> bool:
    return name.rpartition(".")[2] in ("weight", "bias")


def _differing(ranks: Sequence[Mapping[str, ReadableTensor]]) -> list[str]:
    """The tensors that are not the same in all, in every bit; a chunk of each is in memory at a time."""
    names = dict.fromkeys(name for tensors in ranks for name in tensors)
    return [name for name in names if not _agree([tensors.get(name) for tensors in ranks])]


def _agree(tensors: Sequence[ReadableTensor | None]) -> bool:
    known = [tensor for tensor in tensors if tensor is not None]
    if len(known) < len(tensors) or len({(tuple(one.shape), one.dtype) for one in known}) > 1:
        return False
    chunks: Iterator[tuple[bytes, ...]] = zip(*(one.chunks() for one in known), strict=True)
    return all(chunk == group[0] for group in chunks for chunk in group[1:])


def _largest(layers: Sequence[PooledLayer], what: str) -> tuple[float, str] | None:
    """The largest number of any channel, and where it is."""
    best: tuple[float, str] | None = None
    for layer in layers:
        numbers: Tensor = getattr(layer, what)
        usable = numbers.nan_to_num(nan=-math.inf)
        channel = int(usable.argmax())
        value = float(usable[channel])
        if math.isfinite(value) and (best is None or value > best[0]):
            best = value, f"{layer.name}, channel {channel}"
    return best
