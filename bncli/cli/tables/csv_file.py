"""Results as CSV (RFC 4180: commas, CRLF, quotes only where needed), for spreadsheets and data frames.

Numbers are written so that they are read back as the same float64; a missing one is an empty field, and
what is not finite is `nan`, `inf` or `-inf`. Names come from strangers' files, and a spreadsheet would
compute one that starts with =, +, -, @, a tab or a carriage return: such a name gets an apostrophe before it.
"""

import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bncli.cli.messages import print_note
from bncli.cli.options import check_writable
from bncli.cli.result_file import result_file
from bncli.errors import ConfigError

STDOUT = Path("-")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")

Row = Mapping[str, Any]


def check_csv_option(path: Path | None, *, as_json: bool) -> None:
    """Refuse before the work begins what could not be written after it: ConfigError or BncliError."""
    if path == STDOUT and as_json:
        raise ConfigError("--csv", ["- and --json would both write to stdout; give --csv a file"])
    if path is not None and path != STDOUT:
        check_writable(path)


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
