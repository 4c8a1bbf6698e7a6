"""The audit of anything that holds BatchNorm layers: a module, a state dict, a file, or layers read before.

The rules and what they can know are in `bncli.batchnorm.audit.rules`.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.batchnorm import Finding, LayerStats, audit_layers, read_running_stats

if TYPE_CHECKING:
    from torch import nn


def audit(
    subject: "nn.Module | Mapping[str, object] | str | Path | Iterable[LayerStats]",
    *,
    thresholds: Mapping[str, float] | None = None,
    select: Collection[str] | None = None,
    ignore: Collection[str] = (),
) -> tuple[Finding, ...]:
    """What is wrong with the running statistics of a network, by code, then in the order of its layers.

    `subject` is a module, a state dict, the path or URL of a checkpoint (nothing in it is executed), or what
    `read_running_stats` returned. A module knows its momentum and eps; a state dict does not, and then
    PyTorch's defaults are assumed and called so. `select` (default: all rules) and `ignore` take codes or
    names, `thresholds` replaces defaults by name.

    Raises CheckpointError for a file that cannot be read, and BncliError for a rule or threshold that does
    not exist.
    """
    return audit_layers(_layers_of(subject), thresholds=thresholds, select=select, ignore=ignore)


def _layers_of(
    subject: "nn.Module | Mapping[str, object] | str | Path | Iterable[LayerStats]",
) -> tuple[LayerStats, ...]:
    if isinstance(subject, str | Path):
        from bncli.checkpoints import open_checkpoint

        with open_checkpoint(subject) as checkpoint:
            return tuple(checkpoint.layers())
    if isinstance(subject, Iterable) and not isinstance(subject, Mapping):
        layers = tuple(subject)
        if all(isinstance(layer, LayerStats) for layer in layers):
            return layers
        from torch import nn

        if not isinstance(subject, nn.Module):  # a Sequential can be iterated too
            raise TypeError("expected a module, a state dict, a path, or what read_running_stats returned")
    return read_running_stats(subject)
