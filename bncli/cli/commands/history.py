"""`bncli inspect-stats RUN_DIR`: how the running statistics came to match the batches, epoch by epoch."""

import fnmatch
from pathlib import Path

from bncli.cli.messages import print_note
from bncli.cli.tables.csv_file import STDOUT, write_csv
from bncli.errors import ConfigError


def is_run_dir(path: Path) -> bool:
    """Whether it is a directory of `bncli train`."""
    return path.is_dir() and any((path / name).is_file() for name in ("metrics.jsonl", "config.yaml"))


def inspect_run(
    run_dir: Path, *, layer: str | None, channels: bool, plot: Path | None, csv: Path | None, as_json: bool
) -> int:
    """Show what a run recorded; nothing is computed."""
    from bncli.cli.tables.csv_layers import convergence_rows
    from bncli.cli.tables.history import describe_convergence, show_convergence
    from bncli.cli.tables.table import print_json
    from bncli.training.convergence import read_convergence

    if channels:
        raise ConfigError("--channels", [f"{run_dir} recorded layers only; give a checkpoint in it"])
    histories = read_convergence(run_dir)
    if layer is not None:
        found = tuple(history for history in histories if fnmatch.fnmatchcase(history.name, layer))
        if not found:
            names = ", ".join(history.name for history in histories)
            raise ConfigError("--layer", [f"no BatchNorm layer matches {layer!r}; there are {names}"])
        histories = found
    if plot is not None:
        from bncli.cli.plots.history import plot_convergence

        plot_convergence(histories, plot, source=str(run_dir))
        print_note(f"wrote {plot}")
    if csv is not None:
        write_csv(convergence_rows(histories), csv)
    if as_json:
        print_json(describe_convergence(str(run_dir), histories))
    elif csv != STDOUT:
        show_convergence(str(run_dir), histories)
    return 0
