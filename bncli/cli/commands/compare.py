"""`bncli compare FIRST SECOND`: how far the running statistics moved, and whether weights did."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bncli.cli.audit_options import refuse_options
from bncli.cli.help_page import COMPUTED, SHOWN
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
from bncli.errors import CheckpointError, ConfigError, IncomparableError

if TYPE_CHECKING:
    from bncli.batchnorm import Comparison

SortBy = Literal["model", "name", "moved"]


def compare_checkpoints(
    context: typer.Context,
    first: Annotated[str, typer.Argument(metavar="FIRST", help=ANY_CHECKPOINT)],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="Another checkpoint of the same network.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="CHECKPOINT...", help="With --ranks: the files of more ranks."),
    ] = None,
    ranks: Annotated[
        bool,
        typer.Option(
            "--ranks",
            help="The files are those of several processes of one training: what differs between them, and"
            " what their pooled statistics are.",
            rich_help_panel=COMPUTED,
        ),
    ] = False,
    values_per_channel: Annotated[
        float | None,
        typer.Option(
            "--values-per-channel",
            metavar="N",
            min=2,
            help="With --ranks: values of a channel in one rank's batch (images x height x width); then"
            " unbiased variances are pooled exactly.  [default: as for very large N]",
            rich_help_panel=COMPUTED,
        ),
    ] = None,
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
    bncli compare --ranks runs/first/best.pt runs/first/last.pt
    """
    if ranks:
        refuse_options(context, {"--sort", "--plot"}, "--ranks", "no effect here; leave it out")
        return _compare_ranks(
            [first, second, *(more or [])],
            key,
            layer,
            csv,
            values_per_channel,
            channels=channels,
            as_json=as_json,
        )
    if more or values_per_channel is not None:
        extra = "--values-per-channel" if not more else f"{2 + len(more)} checkpoints"
        raise ConfigError("compare", [f"{extra}: only with --ranks, for the files of several processes"])
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


def _compare_ranks(
    sources: list[str],
    key: str | None,
    layer: str | None,
    csv: Path | None,
    values: float | None,
    *,
    channels: bool,
    as_json: bool,
) -> int:
    from bncli.batchnorm import compare_ranks
    from bncli.checkpoints import open_checkpoint
    from bncli.checkpoints.byte_source import UnreadableFileError
    from bncli.cli.tables.csv_rows import STDOUT, check_results, write_csv
    from bncli.cli.tables.ranks import rank_rows, show_channels_of_ranks, show_ranks
    from bncli.cli.tables.table import print_json

    check_results(csv, None, *sources, as_json=as_json)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(source, key)) for source in sources]
        try:
            comparison = compare_ranks(opened, values=values)
        except IncomparableError as error:
            raise IncomparableError(f"{', '.join(sources[:4])}: {error}") from None
        except UnreadableFileError as error:
            raise CheckpointError(f"{', '.join(sources[:4])}: {error}") from None
    shown = replace(comparison, layers=matching_layers(comparison.layers, layer))
    if csv is not None:
        write_csv(rank_rows(shown, channels=channels), csv)
    if as_json:
        print_json({"sources": sources, **shown.to_dict(channels=channels), "verdict": comparison.verdict})
    elif csv == STDOUT:
        pass
    elif channels:
        show_channels_of_ranks(shown)
    else:
        show_ranks(sources, shown)
    return 0 if comparison.identical else 1


def _sort(comparison: "Comparison", by: SortBy) -> "Comparison":
    layers = list(comparison.layers)
    if by == "name":
        layers.sort(key=lambda layer: layer.name)
    if by == "moved":  # what has no divergence comes last
        layers.sort(
            key=lambda layer: -1.0 if layer.summary is None else layer.summary.kl or 0.0, reverse=True
        )
    return replace(comparison, layers=tuple(layers))
