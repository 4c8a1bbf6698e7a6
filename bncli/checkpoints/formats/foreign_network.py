"""A network as a file of another framework holds it, in PyTorch's terms."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bncli.batchnorm.layers import Hyperparameters
from bncli.checkpoints.formats.window import Window
from bncli.checkpoints.stored_tensor import StoredTensor


@dataclass(frozen=True)
class ForeignNetwork:
    """What a reader of another framework's file returns in place of a state dict.

    The tensors of BatchNorm layers are called as PyTorch calls them, behind the layer's name and a dot:
    `weight`, `bias`, `running_mean`, `running_var`, each of shape (C,). All others keep their own names.
    """

    tensors: Mapping[str, StoredTensor]
    layers: Mapping[str, Hyperparameters]  # in the order of the network, as far as the file tells it
    notes: tuple[str, ...] = ()  # what a reader of the output should know, a sentence each
    windows: Mapping[str, Window] = field(default_factory=dict)  # of convolutions, as far as the file tells
