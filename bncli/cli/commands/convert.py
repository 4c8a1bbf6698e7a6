"""`bncli convert SOURCE -o NEW`: BatchNorm layers of any framework, or a network, for PyTorch or Keras."""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bncli.cli.audit_options import AssumeOption, assume, parse_assumed
from bncli.cli.help_page import COMPUTED, OUTPUT
from bncli.cli.messages import print_note
from bncli.cli.options import (
    ANY_CHECKPOINT,
    JsonOption,
    KeyOption,
    ModelArgOption,
    ModelOption,
    check_writable,
)
from bncli.errors import BncliError, ConfigError

if TYPE_CHECKING:
    from torch import nn

    from bncli.batchnorm import LayerStats
    from bncli.checkpoints import OpenCheckpoint
    from bncli.checkpoints.convert import Conversion

Target = Literal["pytorch", "keras"]


def convert_checkpoint(
    source: Annotated[str, typer.Argument(metavar="CHECKPOINT", help=ANY_CHECKPOINT)],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="NEW",
            help="The file to write: .safetensors, .pt or .npz; for keras .npz.",
            rich_help_panel=OUTPUT,
        ),
    ],
    to: Annotated[
        Target,
        typer.Option(
            "--to",
            metavar="FRAMEWORK",
            help="The framework to write for: pytorch or keras.",
            rich_help_panel=OUTPUT,
        ),
    ] = "pytorch",
    key: KeyOption = None,
    model: ModelOption = None,
    model_args: ModelArgOption = None,
    values_per_channel: Annotated[
        float | None,
        typer.Option(
            "--values-per-channel",
            metavar="N",
            min=2,
            help="Make biased variances PyTorch's unbiased ones, or for keras the other way: N values of a"
            " channel in a training batch (images x height x width).  [default: variances stay as they are]",
            rich_help_panel=COMPUTED,
        ),
    ] = None,
    assumed: AssumeOption = None,
    as_json: JsonOption = False,
) -> int:
    """Write BatchNorm layers of any framework for PyTorch or Keras.

    Momentum, variances and names are translated; eps and momentum, for which the new file has no place, are
    printed. With --model the layers get the names of that network's, and a whole network of Keras, Flax,
    Haiku or PaddlePaddle is converted for PyTorch, or one of PyTorch for Keras, where layers map one to one.
    CHECKPOINT is only read.

    Examples:
    bncli convert runs/first/last.pt -o layers.npz
    bncli convert runs/first/last.pt -o layers.npz --to keras --json
    """
    from bncli.checkpoints import open_checkpoint
    from bncli.checkpoints.convert import container_of, write_converted
    from bncli.cli.result_file import result_file
    from bncli.cli.tables.convert import conversion_document, show_conversion
    from bncli.cli.tables.table import print_json

    container = container_of(output)
    if to == "keras" and container != "npz":
        raise BncliError(f"{output}: for Keras a name that ends in .npz; the lines that load it are printed")
    check_writable(output, source)
    assumptions = parse_assumed(assumed)
    network = None if model is None else _network(model, model_args)
    with open_checkpoint(source, key) as checkpoint:
        layers = assume(checkpoint.layers(), assumptions)
        for note in checkpoint.notes:
            print_note(note)
        _check_whole(source, checkpoint.tensors, layers)
        if values_per_channel is not None:
            _check_variance(layers, to)
        convert = _to_keras if to == "keras" else _to_pytorch
        conversion = convert(checkpoint, layers, network, values_per_channel)
        own = {layer.source for layer in conversion.layers} | set(conversion.untracked)
        left = [
            name
            for name in checkpoint.tensors
            if name.rpartition(".")[0] not in own and name not in conversion.used
        ]
    with result_file(output, "the converted layers") as file:
        write_converted(conversion, file, container)
    if as_json:
        print_json(conversion_document(source, str(output), conversion, left, to))
    else:
        show_conversion(source, str(output), conversion, left, to)
    return 0


def _network(model: str, arguments: Sequence[str] | None) -> "nn.Module":
    from bncli.cli.named_network import named_network
    from bncli.models import build_network

    named = named_network(model, arguments, None, None, None, None)
    if named is None:
        raise ConfigError("--model", ["name a network, as in torchvision:resnet18"])
    return build_network(named.name, named.arguments)


def _to_pytorch(
    checkpoint: "OpenCheckpoint",
    layers: "Sequence[LayerStats]",
    network: "nn.Module | None",
    values_per_channel: float | None,
) -> "Conversion":
    from bncli.checkpoints.convert import convert_layers
    from bncli.checkpoints.convert_network import convert_network
    from bncli.inference import norms_behind

    if network is None:
        return convert_layers(layers, values_per_channel=values_per_channel)
    behind = norms_behind(network)
    return convert_network(checkpoint, layers, network, behind, values_per_channel=values_per_channel)


def _to_keras(
    checkpoint: "OpenCheckpoint",
    layers: "Sequence[LayerStats]",
    network: "nn.Module | None",
    values_per_channel: float | None,
) -> "Conversion":
    from bncli.checkpoints import load_weights
    from bncli.checkpoints.convert_to_keras import convert_to_keras

    if network is not None:
        framework = layers[0].convention.framework
        if framework != "PyTorch":
            problem = f"with --to keras it goes with a checkpoint of PyTorch; this one is of {framework}"
            raise ConfigError("--model", [problem])
        load_weights(network, checkpoint, partial=None)
    return convert_to_keras(layers, network, values_per_channel=values_per_channel)


def _check_whole(source: str, tensors: Container[str], layers: "Sequence[LayerStats]") -> None:
    """Raise BncliError where an array is there, and what it is is not known."""
    for layer in layers:
        if f"{layer.name}.weight_or_bias" in tensors:
            raise BncliError(
                f"{source}: {layer.name} has a weight or a bias, and the file does not say which; convert the"
                " .keras file"
            )


def _check_variance(layers: "Sequence[LayerStats]", to: Target) -> None:
    averaged = "biased" if to == "keras" else "unbiased"
    if all(layer.convention.variance == averaged for layer in layers):
        framework = layers[0].convention.framework
        raise ConfigError("--values-per-channel", [f"the variances of {framework} are {averaged} already"])
