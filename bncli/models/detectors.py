"""torchvision's detectors, and those made of its parts: what they do that other networks do not.

They normalise and resize images by themselves. And their backbone has FrozenBatchNorm2d where it was made
with weights, and BatchNorm2d where it was made without, as networks are here that a checkpoint is loaded
into. In eval mode both compute the same, so the file alone tells: a frozen layer has no
`num_batches_tracked`. Replacing its statistics would change what the rest was trained on.
"""

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.torchvision_compat import import_torchvision

COUNTER = ".num_batches_tracked"


def is_detector(network: nn.Module) -> bool:
    """Whether torchvision's own preparation of images is part of it."""
    return type(getattr(network, "transform", None)).__name__ == "GeneralizedRCNNTransform"


def freeze_uncounted(network: nn.Module, absent: Collection[str]) -> list[str]:
    """Make those BatchNorm layers frozen ones whose counters are among the absent names; gives their names.

    Other networks than detectors are left alone: files from before PyTorch 0.4.1 have no counters either.
    """
    if not is_detector(network):
        return []
    frozen = []
    for name, layer in list(network.named_modules()):
        if isinstance(layer, _BatchNorm) and name + COUNTER in absent:
            parent, _, child = name.rpartition(".")
            made = import_torchvision().ops.FrozenBatchNorm2d(layer.num_features, layer.eps)
            made.load_state_dict(layer.state_dict())
            setattr(network.get_submodule(parent), child, made)
            frozen.append(name)
    return frozen
