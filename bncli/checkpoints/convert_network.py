"""A whole network of Keras as the state dict of a network of PyTorch, where its layers map one to one.

Layers are matched by name where both libraries are known to have the network (`resnet_names`), else by their
order and shapes. The bias of a convolution whose output goes into BatchNorm alone, and whose counterpart has
none, is taken off the running mean: `conv + bias - mean` is `conv - (mean - bias)`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bncli.batchnorm import LayerStats
from bncli.batchnorm.conventions import KERAS_2, KERAS_2_OR_3, KERAS_3
from bncli.batchnorm.layers import batch_norm_layers
from bncli.checkpoints.any_content import named
from bncli.checkpoints.any_file import OpenCheckpoint
from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.convert import Conversion, convert_layers
from bncli.checkpoints.flat_images import flat_pixels
from bncli.checkpoints.kernel_axes import KernelLayer, flat_of_pytorch, of_pytorch
from bncli.checkpoints.resnet_names import keras_names, note_strides
from bncli.checkpoints.stored_tensor import StoredTensor
from bncli.wording import list_names, plural

_KERNELS = ("0", "kernel", "depthwise_kernel")  # as `.keras` and as `.h5` call them
_KERAS = (KERAS_2, KERAS_3, KERAS_2_OR_3)
_BIASES = ("1", "bias")


@dataclass(frozen=True)
class _Kernel:
    """A convolution or a dense layer of the file."""

    kernel: str  # names of its tensors
    bias: str | None


def kernel_layers(network: nn.Module) -> list[tuple[str, KernelLayer]]:
    """Convolutions and linear layers, in the order of the network."""
    return [(name, part) for name, part in network.named_modules() if isinstance(part, _ConvNd | nn.Linear)]


def convert_network(
    checkpoint: OpenCheckpoint,
    layers: Sequence[LayerStats],
    network: nn.Module,
    norm_behind: Mapping[str, str],
    *,
    values_per_channel: float | None = None,
) -> Conversion:
    """Translate a file of Keras for a network.

    `norm_behind` has, by the name of a convolution, that of the BatchNorm layer that takes all of its output.
    Where other layers do not map one to one, BatchNorm layers alone are translated; `missing` tells what the
    network has beside them.

    Raises:
        CheckpointError: naming the file, where its BatchNorm layers are not those of the network.
    """
    with named(checkpoint.source):
        return _convert(checkpoint.tensors, layers, network, norm_behind, values_per_channel)


def _convert(
    tensors: Mapping[str, StoredTensor],
    layers: Sequence[LayerStats],
    network: nn.Module,
    norm_behind: Mapping[str, str],
    values_per_channel: float | None,
) -> Conversion:
    modules, norms = kernel_layers(network), [name for name, _ in batch_norm_layers(network)]
    is_keras = all(layer.convention in _KERAS for layer in layers)
    found = _kernels_of(tensors, {layer.name for layer in layers}) if is_keras else {}
    chosen, notes = _counterparts(found, layers, network)
    pixels = flat_pixels(network)
    weights = None if pixels is None else _weights_of(tensors, found, modules, chosen, pixels)
    by_name = {layer.name: layer for layer in layers}
    conversion = convert_layers(
        [_in_order(by_name[chosen[name]], (pixels or {}).get(name, 1)) for name in norms],
        values_per_channel=values_per_channel,
        names=norms,
    )
    state, used, folded = dict(conversion.state_dict), set[str](), list[str]()
    for name, module in modules if weights is not None else ():
        source = found[chosen[name]]
        state[f"{name}.weight"] = weights[name]  # type: ignore[index]
        used.add(source.kernel)
        bias = None if source.bias is None else tensors[source.bias].read()
        if module.bias is not None:
            state[f"{name}.bias"] = torch.zeros(len(module.bias)) if bias is None else bias
        elif bias is not None and name in norm_behind:
            mean = f"{norm_behind[name]}.running_mean"
            state[mean] = (state[mean].double() - bias.double()).to(state[mean].dtype)
            folded.append(name)
        if source.bias is not None and (module.bias is not None or name in norm_behind):
            used.add(source.bias)
    if not is_keras:
        notes.append("BatchNorm layers alone were converted: whole networks are converted from Keras only.")
    elif pixels is None:
        notes.append("BatchNorm layers alone were converted, as the network could not be run.")
    elif weights is None:
        notes.append("BatchNorm layers alone were converted: others do not map one to one.")
    if folded:
        biases, names = plural(len(folded), "bias", "biases"), list_names(folded, 3)
        notes.append(
            f"{biases} of convolutions that have none in the network ({names}): taken off the running mean"
            " behind, which changes no output."
        )
    wanted = network.state_dict()
    return replace(
        conversion,
        state_dict={name: state[name] for name in wanted if name in state},
        notes=(*notes, *conversion.notes),
        used=frozenset(used),
        missing=tuple(name for name in wanted if name not in state),
    )


def _counterparts(
    found: Collection[str], layers: Sequence[LayerStats], network: nn.Module
) -> tuple[dict[str, str], list[str]]:
    """By module of the network the file's layer, and in words how they were matched, and what is to be set.

    Raises:
        UnreadableFileError: where the BatchNorm layers are not those of the network.
    """
    modules, norms = kernel_layers(network), batch_norm_layers(network)
    known = keras_names([name for name, _ in (*modules, *norms)])
    by_last = {name.rpartition(".")[2]: name for name in (*found, *(layer.name for layer in layers))}
    if known is not None and set(known.values()) <= set(by_last):
        chosen = {name: by_last[other] for name, other in known.items()}
        strides = note_strides(network, [name for name, _ in modules])
        return chosen, [
            "Layers were matched by their names in Keras applications.",
            *([strides] if strides else []),
        ]
    _check_channels(layers, [(name, norm.num_features) for name, norm in norms])
    chosen = {name: layer.name for (name, _), layer in zip(norms, layers, strict=True)}
    if len(found) == len(modules):
        chosen |= {name: source for (name, _), source in zip(modules, found, strict=True)}
    return chosen, [
        "Layers were matched by their order, shapes and numbers of channels: compare an output with that of"
        f" {layers[0].convention.framework}, as padding, strides and activations are in no state dict."
    ]


def _in_order(layer: LayerStats, pixels: int) -> LayerStats:
    """A layer behind images that were laid flat, with its features in PyTorch's order."""
    if pixels == 1:
        return layer
    tensors = {leaf: getattr(layer, leaf) for leaf in ("weight", "bias", "running_mean", "running_var")}
    moved: dict[str, Any] = {
        leaf: flat_of_pytorch(tensor, pixels) for leaf, tensor in tensors.items() if tensor is not None
    }
    return replace(layer, **moved)


def _kernels_of(tensors: Mapping[str, StoredTensor], norms: set[str]) -> dict[str, _Kernel]:
    """The file's layers that have one kernel and perhaps a bias, in its order."""
    leaves: dict[str, dict[str, str]] = {}
    for name in tensors:
        owner, _, leaf = name.rpartition(".")
        if owner not in norms:
            leaves.setdefault(owner, {})[leaf] = name
    found = {}
    for owner, own in leaves.items():
        kernels = [full for leaf, full in own.items() if leaf in _KERNELS]
        biases = [full for leaf, full in own.items() if leaf in _BIASES]
        is_kernel = len(kernels) == 1 and len(tensors[kernels[0]].shape) > 1
        if is_kernel and all(len(tensors[bias].shape) == 1 for bias in biases):
            found[owner] = _Kernel(kernels[0], biases[0] if biases else None)
    return found


def _weights_of(
    tensors: Mapping[str, StoredTensor],
    found: Mapping[str, _Kernel],
    modules: Sequence[tuple[str, KernelLayer]],
    chosen: Mapping[str, str],
    pixels: Mapping[str, int],
) -> dict[str, Tensor] | None:
    """The weights of all modules in PyTorch's axes; None where one of them has no fitting kernel."""
    weights = {}
    for name, module in modules:
        source = found.get(chosen.get(name, ""))
        weight = (
            None if source is None else of_pytorch(module, tensors[source.kernel].read(), pixels.get(name, 1))
        )
        if weight is None:
            return None
        weights[name] = weight
    return weights


def _check_channels(layers: Sequence[LayerStats], norms: Sequence[tuple[str, int]]) -> None:
    """Raise UnreadableFileError where the two do not have the same numbers of channels in order."""
    sizes = [layer.num_features for layer in layers], [channels for _, channels in norms]
    if sizes[0] != sizes[1]:
        place = next(
            (index for index, (one, two) in enumerate(zip(*sizes, strict=False)) if one != two),
            min(map(len, sizes)),
        )
        raise UnreadableFileError(
            f"its {plural(len(layers), 'BatchNorm layer')} are not those of the network, which has"
            f" {len(norms)}: they differ from layer {place + 1} on, counted from 1"
        )
