"""`bncli inspect-stats`: the running statistics of a checkpoint, and what is wrong with them."""

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bncli.cli.messages import print_note
from bncli.cli.options import CheckpointArgument, JsonOption
from bncli.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from bncli.stats import LayerStats


def inspect_stats(
    checkpoint: CheckpointArgument,
    layer: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only layers of such names, as in 'stages.1.*'.")
    ] = None,
    channels: Annotated[bool, typer.Option("--channels", help="Show every channel of them.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the distributions to a .png or .svg file.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Show the running statistics of every BatchNorm layer. The file is only read."""
    from bncli.cli.render import print_json
    from bncli.cli.render_layers import describe_layers, show_channels, show_layers

    layers = _read_layers(checkpoint)
    if layer is not None:
        found = [item for item in layers if fnmatch.fnmatchcase(item.name, layer)]
        if not found:
            names = ", ".join(item.name for item in layers)
            raise ConfigError("--layer", [f"no BatchNorm layer matches {layer!r}; there are {names}"])
        layers = found
    if plot is not None:
        from bncli.cli.plot import plot_running_stats

        plot_running_stats(layers, plot)
        print_note(f"wrote {plot}")
    if as_json:
        print_json(describe_layers(str(checkpoint), layers, channels=channels))
    elif channels:
        show_channels(layers)
    else:
        show_layers(str(checkpoint), layers)
    return 0


def _read_layers(path: Path) -> "list[LayerStats]":
    """From a checkpoint of bncli's with momentum and eps; from another state dict without them."""
    from collections.abc import Mapping

    from bncli.checkpoint import load_model, read_torch_file
    from bncli.checkpoint.format import FORMAT
    from bncli.stats import read_running_stats

    content = read_torch_file(path)
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        return list(read_running_stats(load_model(path)))
    if isinstance(content, Mapping):
        for state in (content, *(content.get(key) for key in ("state_dict", "model"))):
            layers = read_running_stats(state) if isinstance(state, Mapping) else ()
            if layers:
                return list(layers)
    raise CheckpointError(f"{path}: a torch file, but no BatchNorm layer with running statistics in it")
