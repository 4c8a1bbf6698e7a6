"""Published networks, folded: how many layers, and in float32 as near to float64 as before."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.inference import fold_batch_norm
from bncli.torchvision_compat import import_torchvision


def network_of(name: str) -> nn.Module:
    library, kind = name.split(":")
    import_torchvision()
    if library == "timm":
        import timm

        return timm.create_model(kind, pretrained=False, num_classes=10)
    from torchvision import models

    options = {"init_weights": False} if kind == "googlenet" else {}
    return getattr(models, kind)(weights=None, num_classes=10, **options)


def with_statistics_of(model: nn.Module, images: Tensor) -> nn.Module:
    """In eval mode, with weights that are not their defaults and the statistics of these images."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        model.train()(images)
    return model.eval()


# not folded are layers that come before their activation (densenet121, resnetv2_50), lie in a branch of their
# own (repvgg_a0), or are called in train mode alone (googlenet)
QUICK = [
    ("torchvision:resnet18", 20, 0),
    ("torchvision:mobilenet_v3_small", 34, 0),
    ("torchvision:shufflenet_v2_x0_5", 56, 0),
    ("timm:tf_efficientnet_lite0", 49, 0),
]
SLOW = [
    ("torchvision:resnet50", 53, 0),
    ("torchvision:mobilenet_v2", 52, 0),
    ("torchvision:densenet121", 59, 62),
    ("torchvision:efficientnet_b0", 49, 0),
    ("torchvision:googlenet", 57, 2),
    ("torchvision:regnet_y_400mf", 53, 0),
    ("timm:resnetv2_50", 33, 16),
    ("timm:repvgg_a0", 44, 17),
    ("timm:mobilenetv3_small_100", 34, 0),
    ("timm:hrnet_w18_small", 91, 0),
    ("timm:dpn68", 45, 27),
]


@pytest.mark.parametrize(
    ("name", "num_folded", "num_kept"),
    [*QUICK, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)],
)
def test_a_published_network_computes_the_same(name: str, num_folded: int, num_kept: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    model = with_statistics_of(network_of(name), images)
    folding = fold_batch_norm(model)
    assert (len(folding.folded), len(folding.kept)) == (num_folded, num_kept)
    with torch.no_grad():
        oracle = copy.deepcopy(model).double()(images.double())
        before = (model(images) - oracle).abs().max()
        after = (folding.model(images) - oracle).abs().max()
    assert after < 4 * before + 1e-6 * oracle.abs().max()


def test_the_reasons_of_a_pre_activation_network_say_what_lies_beside_the_layers() -> None:
    lines = str(fold_batch_norm(network_of("torchvision:densenet121"))).splitlines()
    assert lines[0] == "59 of 121 BatchNorm layers folded"
    assert lines[1].startswith(
        "61 kept: it lies between cat and ReLU, with no convolution or linear layer next to it"
    )
    assert len(lines) == 3
