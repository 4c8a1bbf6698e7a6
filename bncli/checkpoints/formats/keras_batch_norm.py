"""A BatchNorm layer as Keras configures it and calls its arrays; and what is collected of a file's layers."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bncli.batchnorm.conventions import Convention
from bncli.batchnorm.layers import Hyperparameters
from bncli.batchnorm.state_dict import FLOATS
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.window import Window
from bncli.checkpoints.stored_tensor import StoredTensor, contiguous_stride, stored_tensor

LEAVES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
STATISTICS = ("moving_mean", "moving_variance")
RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")
_NUMBER = re.compile(r"(.*?)(?:_(\d+))?")


@dataclass(frozen=True)
class LayerConfig:
    """A layer as the configuration describes it."""

    class_name: str
    name: str  # with those of the networks around it, dotted
    config: Mapping[str, Any]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "LayerConfig":
        """A layer by what Keras writes of it: its class and its configuration."""
        config = entry.get("config")
        config = config if isinstance(config, dict) else {}
        return cls(str(entry.get("class_name", "")), str(config.get("name", "")), config)

    @property
    def is_batch_norm(self) -> bool:
        """Whether its class is, or is made from it."""
        return self.class_name in ("BatchNormalization", "SyncBatchNormalization") or (
            "moving_mean_initializer" in self.config and "epsilon" in self.config
        )

    def number(self, key: str) -> float | None:
        """A number of the configuration; None where there is none."""
        value = self.config.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def roles(self) -> tuple[str, ...]:
        """What its arrays are, in their order."""
        affine = [
            role for key, role in (("scale", "gamma"), ("center", "beta")) if self.config.get(key, True)
        ]
        return (*affine, *STATISTICS, *(RENORM if self.config.get("renorm") else ()))


@dataclass
class Found:
    """What is collected while a file is read."""

    convention: Convention
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    layers: dict[str, Hyperparameters] = field(default_factory=dict)
    ambiguous: list[str] = field(default_factory=list)
    renormalised: list[str] = field(default_factory=list)
    windows: Mapping[str, Window] = field(default_factory=dict)
    numbers: Counter[str] = field(default_factory=Counter)  # how often a name was given

    def add(
        self,
        name: str,
        roles: Mapping[str, StoredTensor],
        layer: LayerConfig | None,
        convention: Convention | None = None,
    ) -> None:
        """Note a BatchNorm layer whose arrays are known by what they are: `bn`, and `bn#2` if there is one.

        `convention` is the layer's own, where something tells another than the file's.
        """
        self.numbers[name] += 1
        if self.numbers[name] > 1:
            name = f"{name}#{self.numbers[name]}"
        if "weight_or_bias" in roles:
            self.ambiguous.append(name)
        convention = convention or self.convention
        for role, tensor in roles.items():
            self.tensors[f"{name}.{LEAVES.get(role, role)}"] = _flat(tensor)
        momentum = layer.number("momentum") if layer else None
        self.layers[name] = Hyperparameters(
            num_features=roles["moving_mean"].num_elements,
            eps=layer.number("epsilon") if layer else None,
            momentum=None if momentum is None else convention.translate_momentum(momentum),
            momentum_known=momentum is not None,
            convention=convention,
        )
        if "renorm_mean" in roles:
            self.renormalised.append(name)

    def network(self, notes: tuple[str, ...] = ()) -> ForeignNetwork:
        """All of it, with what is to be said."""
        if self.ambiguous:
            notes += (
                f"{_listed(self.ambiguous)}: one of weight and bias is there, and the file does not say"
                " which; the .keras file does",
            )
        if self.renormalised:
            notes += (
                f"{_listed(self.renormalised)}: batch renormalization, whose moving_variance is no average"
                " of variances",
            )
        return ForeignNetwork(self.tensors, self.layers, notes, self.windows)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def is_batch_norm(roles: Mapping[str, StoredTensor]) -> bool:
    """Whether these arrays, by their Keras names, are those of one layer."""
    if not set(STATISTICS) <= set(roles):
        return False
    parts = [tensor for leaf, tensor in roles.items() if leaf in LEAVES]
    sizes = {tensor.num_elements for tensor in parts}
    return len(sizes) == 1 and 0 not in sizes and all(tensor.dtype in FLOATS for tensor in parts)


def natural_order(path: str) -> list[tuple[str, int]]:
    """A sort key that puts `layer_10` behind `layer_2`, and `layer` before `layer_1`."""
    key = []
    for part in path.split("/"):
        match = _NUMBER.fullmatch(part)
        name, number = match.groups() if match else (part, None)
        key.append((name, int(number[:9]) if number else 0))
    return key


def _flat(tensor: StoredTensor) -> StoredTensor:
    """The same numbers as (C,): virtual batches have (1, 1, C), and two axes (1, C, 1, D)."""
    shape = (tensor.num_elements,)
    if tensor.shape == shape:
        return tensor
    return stored_tensor(tensor.storage, tensor.dtype, tensor.offset, shape, contiguous_stride(shape))
