"""What the readers of other frameworks' files collect: BatchNorm layers by the roles of their arrays."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from bncli.batchnorm.conventions import Convention
from bncli.batchnorm.layers import Hyperparameters
from bncli.batchnorm.state_dict import FLOATS
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.stored_tensor import Storage, StoredTensor, contiguous_stride, stored_tensor

LEAVES = ("weight", "bias", "running_mean", "running_var")


@dataclass
class Collected:
    """A network in the making."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    layers: dict[str, Hyperparameters] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        name: str,
        parts: Mapping[str, StoredTensor],
        convention: Convention,
        *,
        num_features: int | None = None,
        eps: float | None = None,
        momentum: float | None = None,
    ) -> None:
        """A BatchNorm layer: its arrays by PyTorch's names, momentum as the framework writes it."""
        features = num_features or next(iter(parts.values())).num_elements
        # what no BatchNorm could compute with is as good as not there
        if eps is not None and not 0 <= eps < float("inf"):
            eps = None
        if momentum is not None and not 0 <= momentum <= 1:
            momentum = None
        self.layers[name] = Hyperparameters(
            num_features=features,
            eps=eps,
            momentum=None if momentum is None else convention.translate_momentum(momentum),
            momentum_known=momentum is not None,
            convention=convention,
        )
        self.tensors |= {f"{name}.{leaf}": flat(tensor) for leaf, tensor in parts.items()}

    def add_others(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Tensors that belong to no BatchNorm layer; where a name is taken, another is made of it."""
        for name, tensor in tensors.items():
            self.tensors[free_name(name, self.tensors)] = tensor

    def network(self) -> ForeignNetwork:
        """All of it."""
        return ForeignNetwork(self.tensors, self.layers, tuple(self.notes))


def are_statistics(mean: StoredTensor | None, var: StoredTensor | None) -> bool:
    """Whether two arrays can be the running statistics of one layer."""
    return (
        mean is not None
        and var is not None
        and mean.num_elements == var.num_elements > 0
        and {mean.dtype, var.dtype} <= set(FLOATS)
    )


def free_name(name: str, taken: Iterable[str] | Mapping[str, object]) -> str:
    """The name, or with a number behind it where it is taken: `bn#2`."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}#{number}"
    return found


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first few of some names, and how many more there are."""
    known = [name if len(name) <= 80 else f"{name[:77]}..." for name in names]
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


def flat(tensor: StoredTensor) -> StoredTensor:
    """The same numbers as (C,), of an array that lies row by row."""
    shape = (tensor.num_elements,)
    if tensor.shape == shape or not tensor.is_contiguous:
        return tensor
    return stored_tensor(tensor.storage, tensor.dtype, tensor.offset, shape, (1,))


def contiguous(storage: Storage, dtype: object, shape: tuple[int, ...]) -> StoredTensor:
    """A tensor that fills a storage row by row, checked against its size."""
    return stored_tensor(storage, dtype, 0, shape, contiguous_stride(shape))  # type: ignore[arg-type]


def from_float32(value: float) -> float:
    """The number that a person wrote, of one that a file keeps as float32: 9.99999975e-06 is 1e-05."""
    return float(str(np.float32(value)))


def natural(text: str) -> list[tuple[str, int]]:
    """A sort key that puts `layer10` behind `layer2`."""
    return [(words, int(digits[:18] or 0)) for words, digits in re.findall(r"(\D*)(\d*)", text[:2000])]
