"""A whole network of another framework as a state dict of PyTorch, where layers map one to one.

Layers are matched by name where a library is known to have the network (`resnet_names`), else by equal names,
and those of Keras, whose files have the network's order, else by their order and shapes. The bias of a
convolution whose output goes into BatchNorm alone, and whose counterpart has none, is taken off the running
mean: `conv + bias - mean` is `conv - (mean - bias)`.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bncli.batchnorm import LayerStats
from bncli.batchnorm.conventions import (
    FLAX,
    HAIKU,
    KERAS_2,
    KERAS_2_OR_3,
    KERAS_3,
    PADDLE,
    PYTORCH,
    Convention,
)
from bncli.batchnorm.layers import batch_norm_layers
from bncli.checkpoints.any_content import named
from bncli.checkpoints.any_file import OpenCheckpoint
from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.convert import Conversion, convert_layers
from bncli.checkpoints.flat_images import flat_pixels
from bncli.checkpoints.formats.window import Window, same_padding
from bncli.checkpoints.kernel_axes import KernelLayer, Layout, flat_of_pytorch, is_channels_last, of_pytorch
from bncli.checkpoints.resnet_names import flax_names, haiku_names, keras_names, note_strides
from bncli.checkpoints.stored_tensor import StoredTensor
from bncli.checkpoints.windows import describe_windows, windows_of
from bncli.wording import list_names, plural

_KERNELS = ("0", "kernel", "depthwise_kernel", "w", "weight")  # as `.keras`, `.h5` and others call them
_PARAMS = re.compile(r"(.*\.)?params\.")
_BIASES = ("1", "bias", "b")
LAYOUTS: dict[Convention, Layout] = {
    KERAS_2: "keras", KERAS_3: "keras", KERAS_2_OR_3: "keras",
    FLAX: "jax", HAIKU: "jax", PADDLE: "paddle",
}  # fmt: skip
# by framework, where it has a ResNet: its layers' names by torchvision's
_KNOWN: dict[Convention, tuple[str, Callable[[Collection[str]], dict[str, str] | None]]] = {
    KERAS_2: ("Keras applications", keras_names),
    KERAS_3: ("Keras applications", keras_names),
    KERAS_2_OR_3: ("Keras applications", keras_names),
    FLAX: ("Flax's ImageNet example", flax_names),
    HAIKU: ("Haiku's ResNet", haiku_names),
}


@dataclass(frozen=True)
class _Kernel:
    """A convolution or a dense layer of the file."""

    kernel: str  # names of its tensors
    bias: str | None


@dataclass(frozen=True)
class _Matched:
    """Which layer of the file is which of the network."""

    chosen: Mapping[str, str]  # by module of the network
    sentence: str  # how they were found
    library: str | None = None  # whose names are known


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
    """Translate a file of another framework for a network.

    `norm_behind` has, by the name of a convolution, that of the BatchNorm layer that takes all of its output.
    Where other layers do not map one to one, BatchNorm layers alone are translated; `missing` tells what the
    network has beside them.

    Raises:
        CheckpointError: naming the file, where its BatchNorm layers are not those of the network.
    """
    with named(checkpoint.source):
        return _convert(checkpoint, layers, network, norm_behind, values_per_channel)


def _convert(
    checkpoint: OpenCheckpoint,
    layers: Sequence[LayerStats],
    network: nn.Module,
    norm_behind: Mapping[str, str],
    values_per_channel: float | None,
) -> Conversion:
    tensors = checkpoint.tensors
    modules, norms = kernel_layers(network), [name for name, _ in batch_norm_layers(network)]
    conventions = {layer.convention for layer in layers}
    layout = LAYOUTS.get(layers[0].convention) if len(conventions) == 1 else None
    found = {} if layout is None else _kernels_of(tensors, {layer.name for layer in layers})
    matched = _counterparts(found, layers, network)
    chosen, notes = matched.chosen, [matched.sentence]
    pixels = flat_pixels(network)
    weights = None
    if pixels is not None and layout is not None:
        weights = _weights_of(tensors, found, modules, chosen, pixels, layout)
    by_name = {layer.name: layer for layer in layers}
    of_flat = pixels if pixels is not None and layout is not None and is_channels_last(layout) else {}
    conversion = convert_layers(
        [_in_order(by_name[chosen[name]], of_flat.get(name, 1)) for name in norms],
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
    framework = layers[0].convention.framework
    if framework == PYTORCH.framework:
        if all(name == chosen[name] for name in norms):
            notes.clear()
        notes.append(
            "The file is PyTorch's already, so only its BatchNorm layers are written; --to keras converts the"
            " network."
        )
    elif layout is None:
        notes.append(
            f"BatchNorm layers alone were converted: whole networks are not converted from {framework}."
        )
    elif pixels is None:
        notes.append("BatchNorm layers alone were converted, as the network could not be run.")
    elif weights is None:
        notes.append("BatchNorm layers alone were converted: others do not map one to one.")
    else:
        notes += _note_windows(matched, checkpoint.windows, layers[0].convention, network, modules)
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
        classes=tuple(sorted({_class_of(norm) for _, norm in batch_norm_layers(network)})),
    )


def _class_of(norm: nn.Module) -> str:
    """Its class, or the nearest above it that PyTorch has."""
    own = (one for one in type(norm).__mro__ if one.__module__ == nn.BatchNorm2d.__module__)
    return next(one.__name__.removeprefix("_") for one in own)


def _counterparts(found: Collection[str], layers: Sequence[LayerStats], network: nn.Module) -> _Matched:
    """Which layer is which, and how that was found.

    Raises:
        UnreadableFileError: where the BatchNorm layers are not those of the network.
    """
    modules, norms = kernel_layers(network), batch_norm_layers(network)
    wanted = [name for name, _ in (*modules, *norms)]
    own = [*found, *(layer.name for layer in layers)]
    convention = layers[0].convention
    library, names_of = _KNOWN.get(convention, ("", lambda _: None))
    if (known := names_of(wanted)) is not None and (chosen := _by_end(known, own)) is not None:
        return _Matched(chosen, f"Layers were matched by their names in {library}.", library)
    by_words = {_words(name): name for name in own}
    if len(by_words) == len(own) and {_words(name) for name in wanted} <= set(by_words):
        chosen = {name: by_words[_words(name)] for name in wanted}
        return _Matched(chosen, "Layers were matched by their names, which are the same in both.")
    _check_channels(layers, [(name, norm.num_features) for name, norm in norms])
    chosen = {name: layer.name for (name, _), layer in zip(norms, layers, strict=True)}
    in_order = LAYOUTS.get(convention) == "keras" and len(found) == len(modules)
    if in_order:
        chosen |= {name: source for (name, _), source in zip(modules, found, strict=True)}
    return _Matched(
        chosen,
        "Layers were matched by their order, shapes and numbers of channels: compare an output with that of"
        f" {convention.framework}, as activations and pooling are in no state dict.",
    )


def _by_end(known: Mapping[str, str], own: Collection[str]) -> dict[str, str] | None:
    """The file's layers by the network's, where their names end as `known` says; None unless all do."""
    ends: dict[str, list[str]] = {}
    for name in own:
        for start in (0, *(match.end() for match in re.finditer(r"\.|/~/", name))):
            ends.setdefault(name[start:], []).append(name)
    chosen = {name: ends.get(other, []) for name, other in known.items()}
    if any(len(names) != 1 for names in chosen.values()):
        return None
    return {name: names[0] for name, names in chosen.items()}


def _words(name: str) -> str:
    """A name as it is in any framework: a list's elements are `blocks.0` in PyTorch, `blocks_0` in linen."""
    return re.sub(r"_(?=\d+(\.|$))", ".", name)


def _note_windows(
    matched: _Matched,
    of_file: Mapping[str, Window],
    convention: Convention,
    network: nn.Module,
    modules: Sequence[tuple[str, KernelLayer]],
) -> list[str]:
    """What has to be set in the network, as neither strides nor padding are in a state dict."""
    wanted = {name: of_file[own] for name, own in matched.chosen.items() if own in of_file}
    own = windows_of(network)
    if convention in (FLAX, HAIKU) and matched.library is not None:
        wanted = {
            name: Window(module.stride, same_padding(module.kernel_size, module.stride, module.dilation))
            for name, module in modules
            if isinstance(module, _ConvNd) and (convention is HAIKU or name != "conv1")
        }
        notes = describe_windows(own, wanted, matched.library)
        return [*notes, "So it does in max pooling, by zeros as well behind a ReLU."] if notes else []
    if wanted and own:
        return describe_windows(own, wanted, convention.framework)
    if matched.library is not None:
        strides = note_strides(network, [name for name, _ in modules])
        return [] if strides is None else [strides]
    return ["The file does not tell strides and padding: compare them by hand."]


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
    """The file's layers that have one kernel and perhaps a bias, in its order.

    Flax' `params.` is left out of their names, as it is of BatchNorm layers', and the optimizer's copies are.
    """
    leaves: dict[str, dict[str, str]] = {}
    for name in tensors:
        owner, _, leaf = name.rpartition(".")
        if "opt_state" in owner.split("."):
            continue
        owner = _PARAMS.sub("", owner)
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
    layout: Layout,
) -> dict[str, Tensor] | None:
    """The weights of all modules in PyTorch's axes; None where one of them has no fitting kernel."""
    weights = {}
    for name, module in modules:
        source = found.get(chosen.get(name, ""))
        if source is None:
            return None
        weight = of_pytorch(module, tensors[source.kernel].read(), pixels.get(name, 1), layout)
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
