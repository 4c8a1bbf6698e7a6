"""Results as CSV: the rows of each command, written after RFC 4180 (commas, CRLF, quotes where needed).

Numbers are written so that they are read back as the same float64; a missing one is an empty field, and
what is not finite is `nan`, `inf` or `-inf`. Names come from strangers' files, and a spreadsheet would
compute one that starts with =, +, -, @, a tab or a carriage return: such a name gets an apostrophe before it.
"""

import csv
import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bncli.batchnorm import Finding, LayerStats, summarize
from bncli.cli.messages import print_note
from bncli.cli.options import check_writable
from bncli.cli.result_file import result_file
from bncli.cli.tables.inspect_stats import flags_of
from bncli.errors import ConfigError

STDOUT = Path("-")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")

Row = Mapping[str, Any]


def check_results(csv: Path | None, plot: Path | None, *inputs: Path | str, as_json: bool) -> None:
    """Refuse before the work begins what could not be written after it, or is an input.

    Raises ConfigError or BncliError.
    """
    if csv == STDOUT and as_json:
        raise ConfigError("--csv", ["- and --json would both write to stdout; give --csv a file"])
    for path in (csv, plot):
        if path is not None and path != STDOUT:
            check_writable(path, *inputs)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write rows of the same columns, with a header, to a file or, for the path `-`, to stdout.

    Raises BncliError for a file that cannot be written.
    """
    text = format_csv(list(rows))
    if path == STDOUT:
        sys.stdout.write(text)
        return
    with result_file(path, "the CSV file") as file:
        file.write(text.encode())
    print_note(f"wrote {path}")


def format_csv(rows: Sequence[Row]) -> str:
    """The rows and their header; nothing for no rows."""
    if not rows:
        return ""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(rows[0])
    writer.writerows([_field(value) for value in row.values()] for row in rows)
    # half of a surrogate pair, which a damaged file may call a layer, is no text that UTF-8 has bytes for
    return buffer.getvalue().encode(errors="backslashreplace").decode()


def _field(value: object) -> object:
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else value


QUANTITIES = ("running_mean", "running_var", "weight", "bias")
EXTREMES = ("min", "median", "max")


def layer_rows(layers: Sequence[LayerStats], findings: Sequence[Finding], *, channels: bool) -> Iterator[Row]:
    """One row per layer, or per channel."""
    flags = flags_of(findings)
    for layer in layers:
        if channels:
            yield from _channel_rows(layer)
            continue
        summaries = {name: summarize(getattr(layer, name)) for name in QUANTITIES}
        yield {
            "layer": layer.name,
            "num_features": layer.num_features,
            "num_batches_tracked": layer.num_batches_tracked,
            "momentum": layer.momentum,
            "eps": layer.eps,
            **{
                f"{name}_{which}": None if summary is None else getattr(summary, which)
                for name, summary in summaries.items()
                for which in EXTREMES
            },
            "flags": flags[layer.name],
        }


def _channel_rows(layer: LayerStats) -> Iterator[Row]:
    tensors = [getattr(layer, name) for name in QUANTITIES]
    columns = [[None] * layer.num_features if tensor is None else tensor.tolist() for tensor in tensors]
    for channel, values in enumerate(zip(*columns, strict=True)):
        yield {"layer": layer.name, "channel": channel, **dict(zip(QUANTITIES, values, strict=True))}
