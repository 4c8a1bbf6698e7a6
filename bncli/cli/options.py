"""Options that several commands share, and how their values are read."""

from pathlib import Path
from typing import Annotated

import typer

from bncli.errors import BncliError, ConfigError

CheckpointArgument = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A file of `bncli train`.")]
ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as train.epochs=3; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
BatchInvariantOption = Annotated[
    bool,
    typer.Option("--batch-invariant", help="Compute every image in batches of one fixed number of rows."),
]


def parse_sizes(text: str, option: str, *, example: str = "batch sizes such as 1,2,4,8") -> tuple[int, ...]:
    """Whole numbers of 1 or more between commas, in rising order, each once.

    Raises ConfigError, naming the option, for anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    # more digits than any size has: Python refuses to read some thousands of them
    if not all(part.isascii() and part.isdigit() and len(part) < 19 and int(part) >= 1 for part in parts):
        raise ConfigError(option, [f"expected {example}, found {text!r}"])
    return tuple(sorted({int(part) for part in parts}))


def check_writable(path: Path) -> None:
    """Raise BncliError where a file clearly cannot be written, before the work whose result it is to hold."""
    if path.is_dir():
        raise BncliError(f"{path}: cannot be written: it is a directory")
    if not path.parent.is_dir():
        raise BncliError(f"{path}: cannot be written: there is no directory {path.parent}")


def make_empty_dir(path: Path) -> None:
    """Create a directory for results. Raises BncliError where it holds something, or cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise BncliError(f"{path}: the directory is not empty; choose another")
    except OSError as error:
        raise BncliError(f"{path}: cannot be made: {error.strerror or error}") from None
