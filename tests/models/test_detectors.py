"""torchvision's detectors, against those that torchvision itself makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bncli.checkpoints import load_weights
from bncli.models.detectors import freeze_uncounted, is_detector
from bncli.torchvision_compat import import_torchvision
from tests.conftest import Bncli

Make = Callable[..., nn.Module]
torchvision = import_torchvision()

DETECTOR = """
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone


def make(norm_layer=nn.BatchNorm2d):
    backbone = mobilenet_backbone(
        backbone_name="mobilenet_v3_small", weights=None, fpn=True, norm_layer=norm_layer, trainable_layers=6
    )
    anchors = AnchorGenerator(sizes=((16,), (32,), (64,)), aspect_ratios=((1.0,),) * 3)
    return RetinaNet(backbone, num_classes=3, anchor_generator=anchors, min_size=64, max_size=64)
"""
DATA = ("--set", "data.name=synthetic", "--set", "data.num_train=12", "--set", "data.num_test=10")
COMPUTED = ("--set", "runtime.precision=float32", "--device", "cpu", "--set", "runtime.threads=1")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """What makes a detector, in a file in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("detector.py").write_text(DETECTOR)
    names: dict[str, Any] = {}
    exec(DETECTOR, names)
    made: Make = names["make"]
    return made


def statistics(network: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in network.state_dict().items() if "running_" in key}


def shake(network: nn.Module) -> None:
    torch.manual_seed(0)
    for key, value in statistics(network).items():
        value.uniform_(0.5, 2) if key.endswith("var") else value.normal_()


def test_layers_that_are_frozen_in_the_file_are_frozen_in_the_network(make: Make) -> None:
    frozen = make(torchvision.ops.FrozenBatchNorm2d).eval()
    shake(frozen)
    torch.save(frozen.state_dict(), "a.pt")
    network = make().eval()
    assert is_detector(network)
    loaded = load_weights(network, "a.pt")
    names = freeze_uncounted(network, loaded.kept)
    expected = {key: type(module) for key, module in frozen.named_modules()}
    assert {key: type(module) for key, module in network.named_modules()} == expected
    assert names == [key for key, kind in expected.items() if kind is torchvision.ops.FrozenBatchNorm2d]
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for found, wanted in zip(*(one.backbone(images).values() for one in (network, frozen)), strict=True):
            torch.testing.assert_close(found, wanted)


def test_a_file_without_counters_of_another_network_may_just_be_old() -> None:
    network = torchvision.models.mobilenet_v3_small(weights=None)
    counters = [key for key in network.state_dict() if key.endswith("num_batches_tracked")]
    assert freeze_uncounted(network, counters) == []


def test_a_whole_detector_is_recalibrated_on_pixels_from_0_to_1(bncli: Bncli, make: Make) -> None:
    from bncli.config import SyntheticConfig
    from bncli.data import load_dataset

    network = make().eval()
    shake(network)
    torch.save(network.state_dict(), "a.pt")
    command = ("recalibrate", "a.pt", "--model", "detector.py:make", *DATA, *COMPUTED)
    outcome = bncli(*command, "-o", "new.pt", "--no-evaluate", "--method", "precise")
    assert outcome.code == 0, outcome.err
    assert "--normalization none" in outcome.err
    new = make()
    load_weights(new, "new.pt")
    seen: dict[str, tuple[Tensor, ...]] = {}
    oracle = make()
    load_weights(oracle, "a.pt")
    for key, module in oracle.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda _, args, key=key: seen.update(
                    {key: torch.var_mean(args[0].double(), (0, 2, 3), correction=0)}
                )
            )
    oracle.eval()
    for module in oracle.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    images = load_dataset(SyntheticConfig(num_train=12, num_test=10)).train.images.float() / 255
    with torch.no_grad():
        oracle(list(images))  # as torchvision asks for them
    assert len(seen) == 34
    for key, (var, mean) in seen.items():
        layer = new.get_submodule(key)
        assert ((layer.running_mean - mean).abs() / (var + layer.eps).sqrt()).max() < 1e-3
        assert ((layer.running_var - var).abs() / (var + layer.eps)).max() < 1e-3


def test_a_detector_whose_layers_are_all_frozen_is_left_alone_in_words(bncli: Bncli, make: Make) -> None:
    torch.save(make(torchvision.ops.FrozenBatchNorm2d).state_dict(), "a.pt")
    command = ("recalibrate", "a.pt", "--model", "detector.py:make", *DATA, *COMPUTED)
    outcome = bncli(*command, "-o", "new.pt", "--no-evaluate")
    assert (outcome.code, outcome.out) == (2, "")
    line = outcome.err.splitlines()[-1]
    assert "error: no BatchNorm layer to measure: backbone.body.0.1, " in line
    assert "(34 in all); each is frozen: a FrozenBatchNorm2d never updates its statistics" in line
