"""`bncli history RUN_DIR`: how the running statistics came to match the batches, epoch by epoch."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption, LayerOption, matching_layers


def show_history(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A directory of `bncli train`.")],
    layer: LayerOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it to a .png or .svg file.")] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write rows of CSV to a file, or to stdout for -.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Show how the running statistics of a run came to match its batches, epoch by epoch.

    The run recorded it; nothing is computed. A run that is still going can be read.
    """
    from bncli.cli.tables.csv_rows import STDOUT, check_csv_option, write_csv
    from bncli.cli.tables.history import convergence_rows, show_convergence
    from bncli.cli.tables.table import print_json
    from bncli.training.convergence import read_convergence

    check_csv_option(csv, as_json=as_json)
    found = read_convergence(run_dir)
    found = replace(found, layers=matching_layers(found.layers, layer))
    if plot is not None:
        from bncli.cli.plots.history import plot_convergence

        plot_convergence(found.layers, plot, source=str(run_dir))
        print_note(f"wrote {plot}")
    if csv is not None:
        write_csv(convergence_rows(found), csv)
    if as_json:
        print_json(found.to_dict())
    elif csv != STDOUT:
        show_convergence(found)
    return 0
