"""`bncli compare FIRST SECOND`: how far the running statistics moved, and whether weights did."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bncli.cli.help_page import SHOWN
from bncli.cli.messages import print_note
from bncli.cli.options import (
    ANY_CHECKPOINT,
    ChannelsOption,
    CsvOption,
    JsonOption,
    KeyOption,
    LayerOption,
    PlotOption,
    matching_layers,
)

if TYPE_CHECKING:
    from bncli.batchnorm import Comparison

SortBy = Literal["model", "name", "moved"]


def compare_checkpoints(
    first: Annotated[str, typer.Argument(metavar="FIRST", help=ANY_CHECKPOINT)],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="Another checkpoint of the same network.")],
    layer: LayerOption = None,
    channels: ChannelsOption = False,
    sort: Annotated[
        SortBy,
        typer.Option(
            "--sort",
            metavar="ORDER",
            help="model (as in the network), name, or moved (the layer that moved farthest first, by its"
            " KL divergence).",
            rich_help_panel=SHOWN,
        ),
    ] = "model",
    plot: PlotOption = None,
    csv: CsvOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show how far statistics moved, or what a conversion did.

    The files are only read; they need not be files of bncli, nor both of one framework. Exit code 1 if
    anything differs between the two networks, also where --layer leaves it out.

    Examples:
    bncli compare runs/first/best.pt runs/first/last.pt
    bncli compare runs/first/best.pt runs/first/last.pt --sort moved --csv -
    """
    from bncli.cli.tables.compare import comparison_rows, show_channels_compared, show_comparison
    from bncli.cli.tables.csv_rows import STDOUT, check_results, write_csv
    from bncli.cli.tables.table import print_json

    check_results(csv, plot, first, second, as_json=as_json)
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
    from bncli.checkpoints import compare_checkpoints as compare
    from bncli.checkpoints import open_checkpoint

    with open_checkpoint(first, key) as one, open_checkpoint(second, key) as two:
        return compare(one, two)


def _sort(comparison: "Comparison", by: SortBy) -> "Comparison":
    layers = list(comparison.layers)
    if by == "name":
        layers.sort(key=lambda layer: layer.name)
    if by == "moved":  # what has no divergence comes last
        layers.sort(
            key=lambda layer: -1.0 if layer.summary is None else layer.summary.kl or 0.0, reverse=True
        )
    return replace(comparison, layers=tuple(layers))
