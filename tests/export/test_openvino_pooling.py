"""Activations behind max pooling, which OpenVINO by itself computes ahead of it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bncli.export.engines import OpenVino
from bncli.export.write import engine_files


@pytest.mark.parametrize("suffix", [".xml", ".onnx"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Mish()], ids=str)
def test_an_activation_is_computed_behind_its_pooling(
    tmp_path: Path, activation: nn.Module, suffix: str
) -> None:
    pytest.importorskip("openvino")
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), activation).eval()
    images = torch.randn(5, 3, 16, 16) * 3
    file = tmp_path / f"a{suffix}"
    engine_files(network, images[:2], file)
    with torch.no_grad():
        right = network(images)
        elsewhere = nn.functional.max_pool2d(activation(network[0](images)), 2)
    found = torch.from_numpy(OpenVino.open(file, 1)(images.numpy()))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    if not isinstance(activation, nn.ReLU):  # the order matters
        assert (elsewhere - right).abs().max() > 0.01
