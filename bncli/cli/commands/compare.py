"""`bncli inspect-stats FIRST SECOND`: how far the running statistics moved, and whether weights did."""

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.messages import print_note
from bncli.cli.tables.csv_file import STDOUT, write_csv
from bncli.errors import CheckpointError, ConfigError, IncomparableError

if TYPE_CHECKING:
    from bncli.batchnorm import Comparison


def inspect_pair(
    first: str,
    second: str,
    *,
    key: str | None,
    layer: str | None,
    channels: bool,
    plot: Path | None,
    csv: Path | None,
    as_json: bool,
) -> int:
    """Compare two checkpoints; 1 when they differ. `layer` only restricts what is shown."""
    from bncli.cli.tables.comparison import describe_comparison, show_channels_compared, show_comparison
    from bncli.cli.tables.csv_layers import comparison_rows
    from bncli.cli.tables.table import print_json

    comparison = _compare(first, second, key)
    if layer is not None:
        comparison = _restrict(comparison, layer)
    if plot is not None:
        from bncli.cli.plots.comparison import plot_comparison

        plot_comparison(comparison, plot, first=first, second=second)
        print_note(f"wrote {plot}")
    if csv is not None:
        write_csv(comparison_rows(comparison, channels=channels), csv)
    if as_json:
        print_json(describe_comparison(first, second, comparison, channels=channels))
    elif csv == STDOUT:
        pass
    elif channels:
        show_channels_compared(comparison)
    else:
        show_comparison(first, second, comparison)
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


def _restrict(comparison: "Comparison", pattern: str) -> "Comparison":
    """The same comparison, of which fewer layers are shown; `identical` is still of the whole."""
    from dataclasses import replace

    layers = tuple(x for x in comparison.layers if fnmatch.fnmatchcase(x.name, pattern))
    if not layers:
        names = ", ".join(x.name for x in comparison.layers)
        raise ConfigError("--layer", [f"no BatchNorm layer matches {pattern!r}; both have {names}"])
    return replace(comparison, layers=layers)
