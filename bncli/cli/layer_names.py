"""Which layers `--layer` asks for."""

import fnmatch
from collections.abc import Sequence
from typing import Annotated, Protocol, TypeVar

import typer

from bncli.errors import ConfigError

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
    found = tuple(layer for layer in layers if pattern is None or fnmatch.fnmatchcase(layer.name, pattern))
    if pattern is not None and not found:
        names = ", ".join(layer.name for layer in layers) or "none"
        raise ConfigError("--layer", [f"no BatchNorm layer matches {pattern!r}; there are {names}"])
    return found
