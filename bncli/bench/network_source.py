"""Where the network of a checkpoint comes from, in plain values: a process of its own makes it as well."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bncli.checkpoints import load_checkpoint, load_model
from bncli.checkpoints.named import load_named
from bncli.models import normalize_input


@dataclass(frozen=True)
class NetworkSource:
    """A checkpoint, and the name of its network where the command line gives one."""

    file: str  # or a URL
    is_own: bool = True  # of `bncli train`, which describes its network itself; the name repeats it
    model: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    # the rest is said of other checkpoints only
    key: str | None = None
    partial: tuple[str, ...] | None = ()
    logits: str | None = None
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # mean and std of pixels

    def load(self) -> nn.Module:
        """The network in float32 and eval mode on the CPU, which takes raw images.

        Raises ConfigError or CheckpointError.
        """
        if self.is_own:
            checkpoint = load_checkpoint(self.file, model=self.model, arguments=self.arguments)
            return load_model(checkpoint, source=self.file)
        assert self.model is not None  # nothing else tells which network it is
        network, _ = load_named(
            self.model, self.arguments, self.file, key=self.key, partial=self.partial, logits=self.logits
        )
        if self.normalization is not None:
            mean, std = self.normalization
            normalize_input(network, mean, std, torch.device("cpu"))
        return network
