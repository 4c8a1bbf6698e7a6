"""`bncli convert SOURCE -o NEW`: BatchNorm layers of any framework as a state dict of PyTorch."""

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
    from bncli.batchnorm import LayerStats


def convert_checkpoint(
    source: Annotated[str, typer.Argument(metavar="CHECKPOINT", help=ANY_CHECKPOINT)],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="NEW",
            help="The file to write: .safetensors, .pt or .npz.",
            rich_help_panel=OUTPUT,
        ),
    ],
    to: Annotated[
        Literal["pytorch"],
        typer.Option(
            "--to", metavar="FRAMEWORK", help="The framework to write for: pytorch.", rich_help_panel=OUTPUT
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
            help="Make biased variances PyTorch's unbiased ones: N values of a channel in a training batch"
            " (images x height x width).  [default: variances stay as they are]",
            rich_help_panel=COMPUTED,
        ),
    ] = None,
    assumed: AssumeOption = None,
    as_json: JsonOption = False,
) -> int:
    """Write BatchNorm layers of any framework for PyTorch.

    Momentum, variances and names are translated; eps and momentum, for which a state dict has no place, are
    printed. With --model the layers get the names of that network's. CHECKPOINT is only read.

    Examples:
    bncli convert runs/first/last.pt -o layers.npz
    bncli convert runs/first/last.pt -o layers.pt --json
    """
    from bncli.checkpoints import open_checkpoint
    from bncli.checkpoints.convert import container_of, convert_layers, write_converted
    from bncli.cli.result_file import result_file
    from bncli.cli.tables.convert import conversion_document, show_conversion
    from bncli.cli.tables.table import print_json

    container = container_of(output)
    check_writable(output, source)
    assumptions = parse_assumed(assumed)
    with open_checkpoint(source, key) as checkpoint:
        layers = assume(checkpoint.layers(), assumptions)
        own = {f"{layer.name}." if layer.name else "" for layer in layers}
        left = [name for name in checkpoint.tensors if f"{name.rpartition('.')[0]}." not in own]
        notes = checkpoint.notes
    for note in notes:
        print_note(note)
    _check_whole(source, checkpoint.tensors, layers)
    names = None if model is None else _names_in(model, model_args, layers, source)
    if values_per_channel is not None:
        _check_biased(layers)
    conversion = convert_layers(layers, values_per_channel=values_per_channel, names=names)
    with result_file(output, "the converted layers") as file:
        write_converted(conversion, file, container)
    if as_json:
        print_json(conversion_document(source, str(output), conversion, left))
    else:
        show_conversion(source, str(output), conversion, left)
    return 0


def _check_whole(source: str, tensors: Container[str], layers: "Sequence[LayerStats]") -> None:
    """Raise BncliError where an array is there, and what it is is not known."""
    for layer in layers:
        if f"{layer.name}.weight_or_bias" in tensors:
            raise BncliError(
                f"{source}: {layer.name} has a weight or a bias, and the file does not say which; convert the"
                " .keras file"
            )


def _check_biased(layers: "Sequence[LayerStats]") -> None:
    if all(layer.convention.variance == "unbiased" for layer in layers):
        framework = layers[0].convention.framework
        raise ConfigError("--values-per-channel", [f"the variances of {framework} are unbiased already"])


def _names_in(
    model: str, arguments: Sequence[str] | None, layers: "Sequence[LayerStats]", source: str
) -> list[str]:
    """The names of the network's layers, for those of the file in their order."""
    from bncli.batchnorm.layers import batch_norm_layers
    from bncli.cli.named_network import named_network
    from bncli.models import build_network

    named = named_network(model, arguments, None, None, None, None)
    if named is None:
        raise ConfigError("--model", ["name a network, as in torchvision:resnet18"])
    modules = batch_norm_layers(build_network(named.name, named.arguments))
    sizes = [layer.num_features for layer in layers], [module.num_features for _, module in modules]
    if sizes[0] != sizes[1]:
        place = next(
            (index for index, (one, two) in enumerate(zip(*sizes, strict=False)) if one != two),
            min(map(len, sizes)),
        )
        raise BncliError(
            f"{source}: its {len(layers)} layers are not those of {model}, which has {len(modules)}: they"
            f" differ from layer {place + 1} on, counted from 1"
        )
    print_note(f"layers have the names of {model}: matched by their order and number of channels")
    return [name for name, _ in modules]
