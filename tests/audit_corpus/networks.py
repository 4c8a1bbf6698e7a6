"""Healthy: torchvision's, timm's and bncli's own networks, trained for 50 and for 500 steps."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bncli.torchvision_compat import import_torchvision
from tests.audit_corpus.case import Case, file
from tests.audit_corpus.learning import NUM_CLASSES, inputs, train
from tests.audit_corpus.observed import observe, write_observed

SIZE = 32  # pixels
BATCH = 16

# the cheap ones go on to 500 steps; narrow where the published width takes seconds a step
TORCHVISION: dict[str, tuple[int, ...]] = {
    "resnet18": (50,),
    "mobilenet_v2": (50,),
    "densenet_narrow": (50,),
    "shufflenet_v2_x0_5": (50, 500),
    "googlenet": (50,),
    "regnet_y_400mf": (50,),
    "vgg11_bn_narrow": (50,),
    "efficientnet_b0": (50,),
    "mobilenet_v3_small": (500,),  # momentum 0.01: 0.6 of (0, 1) is left after 50
}
TIMM: dict[str, tuple[int, ...]] = {
    "mobilenetv3_small_050": (50,),
    "efficientnet_lite0": (50,),
    "regnetx_002": (50,),
    "dla46_c": (50,),
    "hrnet_w18_small": (50,),
    "ghostnet_050": (50,),
    "repvgg_a0": (50,),
    "levit_128s": (50,),
    "resnetv2_50": (50,),
    "resnet10t": (50,),
    "ese_vovnet19b_slim_dw": (50,),
    "cs3darknet_focus_s": (50,),
    "mobilevit_xxs": (50,),
    "mobilenetv4_conv_small_050": (50,),
    "xcit_nano_12_p16_224": (50,),
    "convmixer": (50,),
    "lcnet_035": (50, 500),
}
TIMM_OPTIONS: dict[str, dict[str, Any]] = {
    "levit_128s": {"img_size": 64},
    "resnetv2_50": {"layers": (1, 1, 1, 1), "channels": (64, 128, 256, 512)},
}


def torchvision_network(name: str) -> nn.Module:
    """One of torchvision's, untrained, with ten classes."""
    models = import_torchvision().models
    if name == "densenet_narrow":
        return models.DenseNet(8, (6, 12, 24, 16), 16, num_classes=NUM_CLASSES)
    if name == "vgg11_bn_narrow":  # half as wide, and without the head's 120 million weights
        widths: list[str | int] = [32, "M", 64, "M", 128, 128, "M", 256, 256, "M", 256, 256, "M"]
        features = models.vgg.make_layers(widths, batch_norm=True)
        return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, NUM_CLASSES))
    if name == "googlenet":
        return models.googlenet(num_classes=NUM_CLASSES, aux_logits=False, init_weights=False)
    return models.get_model(name, weights=None, num_classes=NUM_CLASSES)


def timm_network(name: str) -> nn.Module:
    """One of timm's, untrained, with ten classes."""
    import_torchvision()  # timm imports it
    import timm
    from timm.models.convmixer import ConvMixer

    if name == "convmixer":
        return ConvMixer(dim=64, depth=8, kernel_size=5, patch_size=4, num_classes=NUM_CLASSES)
    model = timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES, **TIMM_OPTIONS.get(name, {}))
    return nn.Sequential(nn.Upsample(scale_factor=2), model) if name == "levit_128s" else model


@functools.lru_cache(maxsize=2)
def _trained(library: str, name: str, num_steps: int, *, adam: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (timm_network if library == "timm" else torchvision_network)(name).train()
        rate = None if adam else 0.02
        return train(model, num_steps, size=SIZE, batch_size=BATCH, adam=adam, learning_rate=rate)


def trained_network(library: str, name: str, num_steps: int, *, adam: bool) -> nn.Module:
    """A copy of a network after so many steps of AdamW or SGD."""
    return copy.deepcopy(_trained(library, name, num_steps, adam=adam))


def save_observed(model: nn.Module, path: Path, *, size: int = SIZE) -> None:
    """The state dict, and beside it what the network does."""
    torch.save(model.state_dict(), path)
    write_observed(observe(model, inputs(size, 64, 4)), path)


def _make(library: str, name: str, num_steps: int, stem: Path) -> None:
    # each optimiser has its own way to kill channels
    save_observed(trained_network(library, name, num_steps, adam=library == "timm"), file(stem))


def published_cases() -> Iterator[Case]:
    """torchvision's and timm's networks."""
    for library, networks in (("torchvision", TORCHVISION), ("timm", TIMM)):
        for name, all_steps in networks.items():
            for num_steps in all_steps:
                yield Case(
                    f"healthy/{library}-{name}-{num_steps}",
                    f"{library}'s {name}, {num_steps} steps, state dict",
                    functools.partial(_make, library, name, num_steps),
                )
