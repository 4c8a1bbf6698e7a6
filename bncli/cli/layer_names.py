"""Which layers `--layer` asks for."""

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
    from bncli.batchnorm.population.selection import name_matches, no_match

    found = tuple(layer for layer in layers if name_matches(pattern, layer.name))
    if pattern is not None and not found:
        raise ConfigError("--layer", [no_match(repr(pattern), [layer.name for layer in layers])])
    return found
