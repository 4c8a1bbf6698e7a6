"""A network by name, with the tensors of any checkpoint of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bncli.checkpoints import LoadedWeights, load_weights
from bncli.models import build_network
from bncli.models.detectors import freeze_uncounted
from bncli.models.picked_output import pick_output


def load_named(
    name: str,
    arguments: Mapping[str, Any],
    source: str,
    *,
    key: str | None = None,
    partial: Sequence[str] | None = (),
    logits: str | None = None,
) -> tuple[nn.Module, LoadedWeights]:
    """The network in eval mode on the CPU with the tensors of `source`, a path or a URL; and which those are.

    Its code is run. Raises ConfigError or CheckpointError.
    """
    network = build_network(name, dict(arguments))
    loaded = load_weights(network, source, key=key, partial=partial)
    freeze_uncounted(network, loaded.kept)
    pick_output(network, logits)
    return network.eval(), loaded
