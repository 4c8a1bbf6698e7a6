"""The network of a configuration's `model` section, which takes raw images."""

from collections.abc import Sequence

import torch
from torch import nn

from bncli.config import ConvNetConfig, ModelConfig
from bncli.models.convnet import build_model
from bncli.models.named import build_network
from bncli.models.normalized import normalize_input
from bncli.models.picked_output import pick_output


def build_configured(
    config: ModelConfig,
    num_classes: int,
    *,
    image_size: int,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.25, 0.25, 0.25),
    seed: int = 0,
    keep_helpers: bool = False,
) -> nn.Module:
    """The network on the CPU, with weights drawn from `seed`; the code that its name names is imported.

    It takes images (N, 3, H, W), uint8 in 0..255 or floating point in 0..1, normalised by `mean` and `std`,
    which are in units of the full range. PyTorch's global generator is left as it was. Of several outputs it
    returns the logits alone; with `keep_helpers`, as training does, also those of auxiliary heads.

    Raises:
        ConfigError: there is no such network, it needs other arguments, or cannot be made.
    """
    if isinstance(config, ConvNetConfig):
        return build_model(config, num_classes, image_size=image_size, mean=mean, std=std, seed=seed)
    network = build_network(config.name, config.arguments, seed=seed, num_classes=num_classes)
    name = None if config.logits is None else str(config.logits)
    pick_output(network, name, keep_helpers=keep_helpers)
    normalize_input(network, mean, std, torch.device("cpu"))
    return network
