"""Options that several commands share, and how their values are read; which layers `--layer` asks for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import typer

from bncli.errors import BncliError, ConfigError

CheckpointArgument = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A file of `bncli train`.")]
ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file, or a name that `bncli config` lists.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as train.epochs=3; repeatable."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 or mps: as --set runtime.device."
    ),
]
DataRootOption = Annotated[
    str | None,
    typer.Option("--data-root", metavar="FOLDER", help="Where the data set lies: as --set data.root."),
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


LayerOption = Annotated[
    str | None, typer.Option("--layer", metavar="GLOB", help="Only layers of such names, as in 'stages.1.*'.")
]


class Named(Protocol):
    """Anything that stands for a layer."""

    @property
    def name(self) -> str:
        """Of the layer."""


Item = TypeVar("Item", bound=Named)


def matching_layers(layers: Sequence[Item], pattern: str | None) -> tuple[Item, ...]:
    """Those whose names match the glob; all without one.

    Raises ConfigError where none does, with the names that there are.
    """
    from bncli.batchnorm.population.selection import name_matches, no_match

    found = tuple(layer for layer in layers if name_matches(pattern, layer.name))
    if pattern is not None and not found:
        raise ConfigError("--layer", [no_match(repr(pattern), [layer.name for layer in layers])])
    return found
