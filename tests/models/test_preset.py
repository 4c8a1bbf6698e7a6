"""How libraries evaluate their networks, against their own transforms."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bncli.data import parse_normalization
from bncli.data.decode import Fit, decode
from bncli.models import build_network
from bncli.models.normalized import IMAGENET
from bncli.models.preset import Preset, preset_of
from bncli.torchvision_compat import import_torchvision

torchvision = import_torchvision()
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8))


def prepared(preset: Preset) -> Tensor:
    assert preset.image_size is not None
    file = io.BytesIO()
    PHOTO.save(file, "PNG")
    pixels = decode(file.getvalue(), Fit(preset.image_size, preset.resize, preset.interpolation))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preset.mean, preset.std))
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_b0", "inception_v3"])
def test_torchvisions_networks_see_what_torchvision_shows_them(name: str) -> None:
    preset = preset_of(f"torchvision:{name}", nn.Identity())
    assert preset is not None
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    torch.testing.assert_close(prepared(preset), transforms(PHOTO), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "resnetv2_50x1_bit"])
def test_timms_networks_see_what_timm_shows_them(name: str) -> None:
    from timm.data import create_transform, resolve_data_config

    model = build_network(f"timm:{name}")
    preset = preset_of(f"timm:{name}", model)
    assert preset is not None
    transform = create_transform(**resolve_data_config(model.pretrained_cfg, model=model))
    torch.testing.assert_close(prepared(preset), transform(PHOTO), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["torchvision:raft_small", "package.module:factory", "convnet"])
def test_where_a_library_says_nothing_there_is_no_preset(name: str) -> None:
    assert preset_of(name, nn.Identity()) is None


def test_a_network_for_segmentation_sees_whole_images_normalised_as_torchvision_does() -> None:
    preset = preset_of("torchvision:fcn_resnet50", nn.Identity())
    assert preset is not None
    assert (preset.image_size, preset.resize, preset.normalization) == (None, None, "imagenet")
    transform = torchvision.models.get_model_weights("fcn_resnet50").DEFAULT.transforms()
    assert (tuple(transform.mean), tuple(transform.std)) == (preset.mean, preset.std)


@pytest.mark.parametrize("name", ["torchvision:ssdlite320_mobilenet_v3_large", "own.py:make"])
def test_a_detector_is_given_pixels_that_only_it_normalises(name: str) -> None:
    detector = build_network("torchvision:ssdlite320_mobilenet_v3_large")
    preset = preset_of(name, detector)
    assert preset is not None
    assert (preset.image_size, preset.normalization) == (None, "none")
    transform = torchvision.models.get_model_weights("ssdlite320_mobilenet_v3_large").DEFAULT.transforms()
    expected = transform(PHOTO)  # torchvision's own preparation
    pixels = torch.from_numpy(np.array(PHOTO)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preset.mean, preset.std))
    assert torch.equal((pixels - mean) / std, expected)


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        (Preset(224, 256, "bilinear", *IMAGENET), "imagenet"),
        (Preset(None, None, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), "none"),
        (Preset(224, 256, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), "0.1,0.2,0.3/0.4,0.5,0.6"),
    ],
)
def test_its_normalization_reads_back(preset: Preset, name: str) -> None:
    assert preset.normalization == name
    found = parse_normalization(name)
    assert found is not None
    assert (found.mean, found.std) == (preset.mean, preset.std)
