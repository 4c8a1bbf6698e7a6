"""`bncli compare FIRST SECOND`: how far the running statistics moved, and whether weights did."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption, LayerOption, matching_layers
from bncli.errors import CheckpointError, IncomparableError

if TYPE_CHECKING:
    from bncli.batchnorm import Comparison

SortBy = Literal["model", "name", "moved"]


def compare_checkpoints(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="A file of any kind, or a URL.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="Another of the same network.")],
    layer: LayerOption = None,
    channels: Annotated[bool, typer.Option("--channels", help="Show every channel of them.")] = False,
    sort: Annotated[
        SortBy, typer.Option("--sort", help="By name, or the farthest moved first (by KL divergence).")
    ] = "model",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it to a .png or .svg file.")] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write rows of CSV to a file, or to stdout for -.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Where both state dicts lie, as in 'ema'.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Show how far running statistics moved between two checkpoints, and whether weights did.

    The files are only read. Exits with 1 if anything differs, in the whole files, whatever --layer shows.
    """
    from bncli.cli.tables.compare import comparison_rows, show_channels_compared, show_comparison
    from bncli.cli.tables.csv_rows import STDOUT, check_csv_option, write_csv
    from bncli.cli.tables.table import print_json

    check_csv_option(csv, as_json=as_json)
    comparison = _compare(first, second, key)
    shown = _sort(replace(comparison, layers=matching_layers(comparison.layers, layer)), sort)
    if plot is not None:
        from bncli.cli.plots.compare import plot_comparison

        plot_comparison(shown, plot, first=first, second=second)
        print_note(f"wrote {plot}")
    if csv is not None:
        write_csv(comparison_rows(shown, channels=channels), csv)
    if as_json:
        print_json({"first": first, "second": second, **shown.to_dict(channels=channels)})
    elif csv == STDOUT:
        pass
    elif channels:
        show_channels_compared(shown)
    else:
        show_comparison(first, second, shown)
    return 0 if comparison.identical else 1


def _compare(first: str, second: str, key: str | None) -> "Comparison":
    from bncli.batchnorm import compare
    from bncli.checkpoints import open_checkpoint
    from bncli.checkpoints.byte_source import UnreadableFileError

    with open_checkpoint(first, key) as one, open_checkpoint(second, key) as two:
        try:
            return compare(one, two)
        except IncomparableError as error:
            raise IncomparableError(f"{first}, {second}: {error}") from None
        except UnreadableFileError as error:
            raise CheckpointError(f"{first} or {second}: {error}") from None


def _sort(comparison: "Comparison", by: SortBy) -> "Comparison":
    layers = list(comparison.layers)
    if by == "name":
        layers.sort(key=lambda layer: layer.name)
    if by == "moved":  # what has no divergence comes last
        layers.sort(
            key=lambda layer: -1.0 if layer.summary is None else layer.summary.kl or 0.0, reverse=True
        )
    return replace(comparison, layers=tuple(layers))
