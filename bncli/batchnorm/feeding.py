"""Which tensors stand before a BatchNorm layer, read off the order of a state dict.

A state dict keeps the order in which modules were registered, and that nearly always is the order of the
forward pass. So the tensors that stand between the BatchNorm layer before and a layer are taken to feed it:
the convolution, usually. Wrong where branches meet: the shortcut of a residual block is not counted.

A file whose names are sorted, as safetensors writes them, has lost that order.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
OWN_TENSORS = (*STATISTICS, "weight", "bias")


@dataclass(frozen=True)
class Feeding:
    """What stands before each BatchNorm layer."""

    tensors: Mapping[str, tuple[str, ...]]  # per layer, those that feed it
    position: Mapping[str, int]  # per name of a tensor, in the order of the forward pass
    start: Mapping[str, int]  # per layer, the position of its first tensor

    @property
    def first_layer(self) -> str | None:
        """The layer that no other is before; None without layers."""
        return min(self.start, key=lambda layer: self.start[layer], default=None)


def find_feeding(names: Sequence[str], layers: Collection[str]) -> Feeding:
    """Read it off the names in the order of registration; `layers` are the names of BatchNorm layers."""
    tensors: dict[str, tuple[str, ...]] = {}
    start: dict[str, int] = {}
    known, since_last = set(layers), list[str]()
    for position, name in enumerate(names):
        layer = owner(name, known)
        if layer is None:
            since_last.append(name)
            continue
        if layer not in start:
            tensors[layer], start[layer] = tuple(since_last), position
        since_last.clear()
    return Feeding(tensors, {name: position for position, name in enumerate(names)}, start)


def owner(name: str, layers: Collection[str]) -> str | None:
    """The BatchNorm layer whose tensor this is."""
    layer, _, leaf = name.rpartition(".")
    return layer if leaf in OWN_TENSORS and layer in layers else None


def order_is_lost(dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether the names of tensors (with their types) are sorted within each type, as in safetensors.

    An affine BatchNorm registers its weight before its bias, so the order of registration is hardly ever
    that of the alphabet.
    """
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, dtype in dtypes.items():
        by_dtype.setdefault(dtype, []).append(name)
    return all(names == sorted(names) for names in by_dtype.values())


class WeightMoves:
    """Which weights moved, seen from a layer; None in `changed` is unknown."""

    def __init__(self, changed: Mapping[str, bool | None], layers: set[str], feeding: Feeding | None) -> None:
        weights = [
            name for name, moved in changed.items() if moved is not False and not _is_statistic(name, layers)
        ]
        self._moved = {name: changed[name] for name in weights}  # or may have
        self._feeding = feeding
        self._earliest = (
            None
            if feeding is None
            else min((feeding.position.get(name, 0) for name in weights), default=len(feeding.position))
        )

    def feeding(self, layer: str) -> bool | None:
        """Whether one of those that feed it moved; None where that is unknown."""
        tensors = () if self._feeding is None else self._feeding.tensors.get(layer, ())
        moves = [self._moved.get(name, False) for name in tensors]
        return True if any(moves) else None if None in moves or not moves else False

    def may_be_before(self, layer: str) -> bool:
        """Whether one before it moved, or may have; where the order is unknown, whether any may."""
        if self._feeding is None or self._earliest is None or layer not in self._feeding.start:
            return bool(self._moved)
        return self._earliest < self._feeding.start[layer]


def _is_statistic(name: str, layers: set[str]) -> bool:
    return owner(name, layers) is not None and name.rpartition(".")[2] in STATISTICS
