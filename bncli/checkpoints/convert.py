"""BatchNorm layers of any framework as PyTorch's: a state dict that `load_state_dict` takes.

A state dict holds neither eps nor momentum, so both are told beside it. What other frameworks do not have is
made up so that nothing breaks: a counter of batches, without which PyTorch's first step with momentum None
would replace what was loaded, and a weight of 1 or a bias of 0 where a layer has only the other of both.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from bncli.batchnorm import LayerStats
from bncli.batchnorm.conventions import Variance
from bncli.errors import BncliError, CheckpointError
from bncli.wording import list_names

Container = Literal["safetensors", "pt", "npz"]
CONTAINERS: tuple[Container, ...] = ("safetensors", "pt", "npz")
START_LEFT = 1e-3  # of the start (0, 1), which the counter that is made up claims to be left at most
MAX_BATCHES = 1_000_000


@dataclass(frozen=True, eq=False)
class ConvertedLayer:
    """One layer in PyTorch's terms, and what was made up."""

    name: str  # in the file that is written
    source: str  # in the file that was read
    num_features: int
    eps: float
    momentum: float | None  # weight of the new batch; None: cumulative
    eps_assumed: bool  # the file does not say: the default of its framework
    momentum_assumed: bool
    num_batches_tracked: int
    counter_assumed: bool
    variance: Variance  # that its framework averages
    variance_factor: float  # by which the variance was multiplied; 1 leaves its bits
    next_momentum: float | None  # of its framework's next step, where that still counts up; None: `momentum`
    filled: tuple[str, ...]  # `weight` or `bias`, where the layer had only the other one


@dataclass(frozen=True, eq=False)
class Conversion:
    """A state dict of BatchNorm layers, and what has to be set beside it."""

    framework: str
    state_dict: dict[str, Tensor]  # CPU, in PyTorch's names; bfloat16 and float16 as they were
    layers: tuple[ConvertedLayer, ...]
    notes: tuple[str, ...]  # how it was done, and where further training differs: a sentence each
    used: frozenset[str] = frozenset()  # of the file, that were converted beside those of BatchNorm
    missing: tuple[str, ...] = ()  # tensors of the network that the file had nothing for
    untracked: tuple[
        str, ...
    ] = ()  # layers of the file that keep no statistics: weight and bias were written
    classes: tuple[str, ...] = ()  # of the network's BatchNorm layers, by name; empty: unknown


def convert_layers(
    layers: Sequence[LayerStats],
    *,
    values_per_channel: float | None = None,
    names: Sequence[str] | None = None,
) -> Conversion:
    """Translate layers, in their order; `names` are other names for them, one each.

    `values_per_channel` is the n of a training batch (images x height x width) by which biased variances are
    made PyTorch's unbiased ones, n / (n - 1) times as large.

    Raises:
        CheckpointError: where no layer has running statistics.
    """
    state: dict[str, Tensor] = {}
    found, untracked = [], []
    for name, layer in zip(names or [layer.name for layer in layers], layers, strict=True):
        prefix = f"{name}." if name else ""
        if layer.is_tracked:
            converted, tensors = _convert(name, layer, values_per_channel)
            found.append(converted)
        else:
            tensors = {leaf: tensor for leaf, tensor in _affine(layer).items() if tensor is not None}
            untracked.append(layer.name)
        state |= {f"{prefix}{leaf}": tensor for leaf, tensor in tensors.items()}
    check_tracked(layers)
    framework = layers[0].convention.framework if layers else "PyTorch"
    notes = tuple(_notes(framework, found, untracked))
    return Conversion(framework, state, tuple(found), notes, untracked=tuple(untracked))


def check_tracked(layers: Sequence[LayerStats]) -> None:
    """Raise CheckpointError where there are layers, and none of them has running statistics."""
    if layers and not any(layer.is_tracked for layer in layers):
        raise CheckpointError(f"{layers[0].name}: has no running statistics to convert")


def _affine(layer: LayerStats) -> dict[str, Tensor | None]:
    return {"weight": layer.weight, "bias": layer.bias}


def _notes(framework: str, layers: Sequence[ConvertedLayer], untracked: Sequence[str]) -> Iterator[str]:
    """Where PyTorch's next steps are not those of the framework, and what makes them the same."""
    if untracked:
        yield (
            f"No running statistics in {list_names(untracked)}: build with track_running_stats=False there."
        )
    uncorrected = {layer.variance for layer in layers if layer.variance_factor == 1}
    if "biased" in uncorrected:
        yield (
            f"{framework} averages biased variances, PyTorch those times n / (n - 1), with n values per"
            " channel: before further training give --values-per-channel N."
        )
    if "biased or unbiased" in uncorrected:
        yield (
            "The file does not say whether its variances are biased: where they are, before further training"
            " give --values-per-channel N, as PyTorch averages n / (n - 1) times as much."
        )
    if any(layer.variance == "unbiased for images" for layer in layers):
        yield (
            f"{framework} averages PyTorch's variances behind layers with pixels, and biased ones behind"
            " others: --values-per-channel N is right for the latter."
        )
    young = [layer for layer in layers if layer.next_momentum is not None]
    if young:
        one = max(young, key=lambda layer: layer.next_momentum or 0)
        yield (
            f"{framework} divides its averages by 1 - (1 - momentum)^t, after t calls: its next batch would"
            f" weigh {one.next_momentum:.3g} in {one.name}, later ones less, down to {one.momentum:g} as at"
            " once in PyTorch."
        )


def _convert(name: str, layer: LayerStats, values: float | None) -> tuple[ConvertedLayer, dict[str, Tensor]]:
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None and var is not None
    factor = 1.0 if values is None else values / (values - 1)
    affine = _affine(layer)
    filled = tuple(
        leaf
        for leaf, tensor in affine.items()
        if tensor is None and any(one is not None for one in affine.values())
    )
    tensors: dict[str, Tensor] = {}
    for leaf, tensor in affine.items():
        if tensor is not None:
            tensors[leaf] = tensor
        elif leaf in filled:
            tensors[leaf] = torch.ones_like(mean) if leaf == "weight" else torch.zeros_like(mean)
    tensors["running_mean"] = mean
    tensors["running_var"] = var if factor == 1 else (var.double() * factor).to(var.dtype)
    momentum = layer.momentum if layer.hyperparameters_known else layer.convention.new_batch_weight
    count = layer.num_batches_tracked
    counter_assumed = count is None or count < 1
    if counter_assumed:
        count = _assumed_count(momentum)
    assert count is not None
    tensors["num_batches_tracked"] = torch.tensor(count)
    converted = ConvertedLayer(
        name, layer.name, layer.num_features, layer.eps_or_default, momentum, layer.eps is None,
        not layer.hyperparameters_known, count, counter_assumed, layer.convention.variance, factor,
        None if counter_assumed else _next_momentum(layer, momentum, count), filled,
    )  # fmt: skip
    return converted, tensors


def _next_momentum(layer: LayerStats, momentum: float | None, count: int) -> float | None:
    """The weight of the next batch in an average that is divided by 1 - (1 - momentum)^count.

    None where that is `momentum` in all but the last digits, as it is in averages that are not divided.
    """
    if layer.convention.starts_at_0_1 or momentum is None or not 0 < momentum < 1:
        return None
    weight = momentum / (1 - (1 - momentum) ** (count + 1))
    return weight if weight > 1.001 * momentum else None


def _assumed_count(momentum: float | None) -> int:
    """Batches after which no more than START_LEFT of the start is left; with momentum None as with 0.1."""
    weight = 0.1 if momentum is None else momentum
    if not 0 < weight < 1:
        return 1 if weight == 1 else MAX_BATCHES
    return min(MAX_BATCHES, math.ceil(math.log(START_LEFT) / math.log1p(-weight)))


def container_of(path: Path) -> Container:
    """Which container a file's name asks for.

    Raises:
        BncliError: for another ending.
    """
    suffix = path.suffix.lower().lstrip(".")
    suffix = "pt" if suffix == "pth" else suffix
    for container in CONTAINERS:
        if suffix == container:
            return container
    raise BncliError(f"{path}: a name that ends in .safetensors, .pt or .npz says what to write")


def write_converted(conversion: Conversion, file: IO[bytes], container: Container) -> None:
    """Write the state dict.

    Raises:
        BncliError: where the library of the container is missing, or NumPy has no such type.
    """
    if container == "pt":
        torch.save(conversion.state_dict, file)
    elif container == "safetensors":
        try:
            from safetensors.torch import save
        except ImportError:
            raise BncliError(
                "to write .safetensors: pip install safetensors; .pt needs nothing more"
            ) from None
        metadata = {"format": "pt"}
        for layer in conversion.layers:  # which no state dict has a place for
            metadata[f"{layer.name}.eps"] = repr(layer.eps)
            metadata[f"{layer.name}.momentum"] = repr(layer.momentum)
        file.write(save(conversion.state_dict, metadata))
    else:
        import numpy as np

        narrow = [name for name, tensor in conversion.state_dict.items() if tensor.dtype == torch.bfloat16]
        if narrow:
            raise BncliError(f"{narrow[0]}: NumPy has no bfloat16; write .safetensors or .pt")
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in conversion.state_dict.items()}
        np.savez(file, **arrays)
