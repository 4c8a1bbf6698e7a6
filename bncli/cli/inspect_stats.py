"""`bncli inspect-stats`: the running statistics of a checkpoint, and what is wrong with them."""

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption
from bncli.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from bncli.stats import LayerStats


def inspect_stats(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT|RUN_DIR", help="What to look at.")],
    second: Annotated[
        Path | None, typer.Argument(metavar="[SECOND]", help="A checkpoint to compare the first with.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only layers of such names, as in 'stages.1.*'.")
    ] = None,
    channels: Annotated[bool, typer.Option("--channels", help="Show every channel of them.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it to a .png or .svg file.")] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write rows of CSV to a file, or to stdout for -.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Show the running statistics of every BatchNorm layer. The file is only read.

    Of two checkpoints: how far they moved, with exit code 1 if anything differs. Of the directory of a run:
    how they came to match the batches, epoch by epoch.
    """
    from bncli.cli.csv_file import STDOUT, check_csv_option, write_csv
    from bncli.cli.csv_layers import layer_rows
    from bncli.cli.inspect_pair import inspect_pair
    from bncli.cli.inspect_run import inspect_run, is_run_dir
    from bncli.cli.render import print_json
    from bncli.cli.render_layers import describe_layers, show_channels, show_layers

    check_csv_option(csv, as_json=as_json)
    if second is not None:
        return inspect_pair(
            checkpoint, second, layer=layer, channels=channels, plot=plot, csv=csv, as_json=as_json
        )
    if is_run_dir(checkpoint):
        return inspect_run(checkpoint, layer=layer, channels=channels, plot=plot, csv=csv, as_json=as_json)
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
    if csv is not None:
        write_csv(layer_rows(layers, channels=channels), csv)
    if as_json:
        print_json(describe_layers(str(checkpoint), layers, channels=channels))
    elif csv == STDOUT:
        pass
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
