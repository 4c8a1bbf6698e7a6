"""Other people's networks, whole and in quick: see `everybodys_networks.py`."""

import importlib.util

import pytest

from tests.models.everybodys_networks import NETWORKS, OWN, WITHOUT, examine_network, refusal

QUICK = {"torchvision:mobilenet_v3_small", *OWN}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_a_network_is_loaded_recalibrated_and_written_back(name: str) -> None:
    if name.startswith("timm:") and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    found = examine_network(name, NETWORKS[name])
    assert found.num_loaded == found.num_tensors
    assert found.num_layers > 0
    assert found.num_findings > 0  # the file is ruined
    assert found.exact_error is None or found.exact_error <= 1e-6
    assert found.precise_error <= 1e-6
    assert found.same_bits
    # eval mode skips the auxiliary heads; what the data never reach is named and left alone
    assert all("aux" in layer.lower() for layer in found.skipped)
    assert bool(found.skipped) == (name in {"torchvision:googlenet", "torchvision:inception_v3"})


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT)
def test_a_network_without_batch_norm_is_refused_in_words(name: str) -> None:
    if name.startswith("timm:") and importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    assert refusal(name).startswith("no BatchNorm layer with running statistics in it, but ")
