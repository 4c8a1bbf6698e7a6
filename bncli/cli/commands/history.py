"""`bncli history RUN_DIR`: how the running statistics came to match the batches, epoch by epoch."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bncli.cli.messages import print_note
from bncli.cli.options import CsvOption, JsonOption, LayerOption, PlotOption, matching_layers


def show_history(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="A folder that `bncli train` saved a run in.")
    ],
    layer: LayerOption = None,
    plot: PlotOption = None,
    csv: CsvOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show, epoch by epoch, how far running statistics lagged.

    The statistics of training batches change with the weights, and the running statistics follow. The run
    recorded how far they were behind; nothing is computed. A run that is still going can be read.

    Examples:
    bncli history runs/first
    bncli history runs/first --layer 'stages.1.*' --plot history.png
    """
    from bncli.cli.tables.csv_rows import STDOUT, check_results, write_csv
    from bncli.cli.tables.history import convergence_rows, show_convergence
    from bncli.cli.tables.table import print_json
    from bncli.training.convergence import read_convergence

    check_results(csv, plot, run_dir, as_json=as_json)
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
