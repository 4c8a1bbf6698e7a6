"""BatchNorm layers of any framework, or a whole network of PyTorch, as arrays that a Keras network takes.

The arrays are called `LAYER/VARIABLE` as Keras calls its variables, so that a few lines assign them. The
layers of a ResNet of torchvision get their names in Keras applications, all others keep theirs.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bncli.batchnorm import LayerStats
from bncli.batchnorm.conventions import KERAS_3
from bncli.checkpoints.convert import Conversion, check_tracked, convert_layers
from bncli.checkpoints.convert_network import kernel_layers
from bncli.checkpoints.flat_images import flat_pixels
from bncli.checkpoints.kernel_axes import flat_of_keras, is_grouped, of_keras
from bncli.checkpoints.resnet_names import keras_names, note_strides
from bncli.errors import CheckpointError
from bncli.wording import list_names, plural

LEAVES = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
_LOOPS = ("for layer in model.layers:", "    for variable in layer.weights:")
_ONLY_NORMS = "if isinstance(layer, keras.layers.BatchNormalization):"
_ASSIGN = 'variable.assign(saved[f"{layer.name}/{variable.name}"])'


def loading_lines(path: str, conversion: Conversion) -> list[str]:
    """The lines that put the arrays of a file into a Keras network called `model`."""
    deepest = (_ASSIGN,) if conversion.used else (_ONLY_NORMS, f"    {_ASSIGN}")
    return [f'saved = numpy.load("{path}")', *_LOOPS, *(f"        {line}" for line in deepest)]


def convert_to_keras(
    layers: Sequence[LayerStats],
    network: nn.Module | None = None,
    *,
    values_per_channel: float | None = None,
) -> Conversion:
    """Translate layers, and with `network` its convolutions and linear layers, whose weights are loaded.

    `values_per_channel` is the n of a training batch by which PyTorch's unbiased variances are made biased,
    as Keras averages them. Convolutions and linear layers without bias get one of 0, as Keras' have one
    unless `use_bias=False`.

    Layers without running statistics are left out: Keras has none such. bfloat16 is written as float32.

    Raises:
        CheckpointError: where no layer has running statistics, and for a network that cannot be run.
    """
    check_tracked(layers)
    untracked = [layer.name for layer in layers if not layer.is_tracked]
    layers = [layer for layer in layers if layer.is_tracked]
    modules = [] if network is None else kernel_layers(network)
    names = {layer.name: layer.name for layer in layers} | {name: name for name, _ in modules}
    known = None if network is None else keras_names(names)
    names |= known or {}
    factor = 1.0 if values_per_channel is None else (values_per_channel - 1) / values_per_channel
    translated = convert_layers(layers, names=[names[layer.name] for layer in layers])
    pixels = {} if network is None else flat_pixels(network)
    if pixels is None:
        raise CheckpointError(
            "--model: the network could not be run on an image of any usual size to see what it lays flat"
        )
    arrays: dict[str, Tensor] = {}
    for layer in layers:
        for leaf, role in LEAVES.items():
            tensor: Tensor | None = getattr(layer, leaf)
            if tensor is not None:
                scaled = leaf == "running_var" and factor != 1
                values = (tensor.double() * factor).to(tensor.dtype) if scaled else tensor
                arrays[f"{names[layer.name]}/{role}"] = flat_of_keras(values, pixels.get(layer.name, 1))
    used, added = set[str](), list[str]()
    for name, module in modules:
        if is_grouped(module):
            continue
        arrays[f"{names[name]}/kernel"] = of_keras(module, pixels.get(name, 1))
        bias = torch.zeros(_outputs(module)) if module.bias is None else module.bias.detach()
        arrays[f"{names[name]}/bias"] = bias
        used.add(f"{name}.weight")
        if module.bias is None:
            added.append(names[name])
        else:
            used.add(f"{name}.bias")
    strides = None
    if network is not None and known:
        strides = note_strides(network, [name for name, _ in modules], for_keras=True)
    return replace(
        translated,
        state_dict={name: _of_numpy(tensor) for name, tensor in arrays.items()},
        layers=tuple(
            replace(
                one,
                momentum=KERAS_3.translate_momentum(0.1 if one.momentum is None else one.momentum),
                variance_factor=factor,
                filled=(),
            )
            for one in translated.layers
        ),
        notes=tuple(_notes(layers, factor, strides, untracked, added)),
        used=frozenset(used),
    )


def _of_numpy(tensor: Tensor) -> Tensor:
    """In a type that NumPy has; float32 holds every bfloat16 exactly."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _outputs(module: nn.Module) -> int:
    return int(module.out_channels if isinstance(module, _ConvNd) else module.out_features)  # type: ignore[arg-type]


def _notes(
    layers: Sequence[LayerStats],
    factor: float,
    strides: str | None,
    untracked: Sequence[str],
    added: Sequence[str],
) -> list[str]:
    notes = [] if strides is None else [strides]
    if added:
        notes.append(
            f"{plural(len(added), 'bias', 'biases')} of 0 added, as Keras' layers have one unless"
            f" use_bias=False: {list_names(added)}."
        )
    if untracked:
        notes.append(
            f"Keras has no BatchNorm without running statistics: not written, {list_names(untracked)}."
        )
    if factor == 1 and any(layer.convention.variance == "unbiased" for layer in layers):
        notes.append(
            "Keras averages biased variances, (n - 1) / n of these, with n values per channel: before further"
            " training give --values-per-channel N."
        )
    cumulative = [layer.name for layer in layers if layer.hyperparameters_known and layer.momentum is None]
    if cumulative:
        names = list_names(cumulative)
        notes.append(f"Keras has no cumulative average: momentum 0.9 is put in its place ({names}).")
    return notes
