"""Which weights feed a BatchNorm layer, guessed from the order of the tensors in a checkpoint.

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
