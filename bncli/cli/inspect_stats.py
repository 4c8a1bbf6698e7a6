"""`bncli inspect-stats`: the running statistics of a checkpoint, and what is wrong with them."""

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption
from bncli.errors import ConfigError

if TYPE_CHECKING:
    from bncli.checkpoint import OpenCheckpoint
    from bncli.stats import LayerStats


def inspect_stats(
    source: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A file of any kind, or a URL.")],
    layer: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only layers of such names, as in 'stages.1.*'.")
    ] = None,
    channels: Annotated[bool, typer.Option("--channels", help="Show every channel of them.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the distributions to a .png or .svg file.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Where the state dict lies, as in 'ema'.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Show the running statistics of every BatchNorm layer. The file is only read."""
    from bncli.cli.render import print_json
    from bncli.cli.render_layers import describe_layers, show_channels, show_layers

    layers, checkpoint = _read_layers(source, key)
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
        described = describe_layers(source, layers, channels=channels)
        described |= {name: getattr(checkpoint, name) for name in ("kind", "key", "candidates")}
        print_json({**described, "num_tensors": len(checkpoint.tensors)})
    elif channels:
        show_channels(layers)
    else:
        found_in_all = f"{len(checkpoint.layer_names)} BatchNorm layers in {len(checkpoint.tensors)} tensors"
        show_layers(f"{source}: found {found_in_all}", layers)
    return 0


def _read_layers(source: str, key: str | None) -> "tuple[list[LayerStats], OpenCheckpoint]":
    """The layers, and the checkpoint they come from, closed again: its numbers are read."""
    from bncli.checkpoint import open_checkpoint

    with open_checkpoint(source, key) as checkpoint:
        layers = list(checkpoint.layers())
    keys = [candidate.key for candidate in checkpoint.candidates]
    if len(keys) > 1 and key is None:
        listed = ", ".join(name or "the top" for name in keys[:8])
        print_note(f"BatchNorm layers under {listed}; took {checkpoint.key or 'the top'} (--key chooses)")
    return layers, checkpoint
