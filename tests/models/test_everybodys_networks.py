"""Other people's networks, whole and in quick: see `everybodys_networks.py`."""

import importlib.util
from pathlib import Path

import pytest

from tests.models.everybodys_networks import CASES, WITHOUT, Case, examine_network, refusal
from tests.models.nms_stand_in import detectors_computable

QUICK = {"Answers", "frozen", "applied_twice", "AutoEncoder"}
SLOW = {  # one of each kind; all are in the table
    "googlenet",
    "mobilenet_v3_small",
    "resnet18",
    "mobilenetv3_small_050",
    "timm_frozen",
    "levit_128s",
    "lraspp_mobilenet_v3_large",
    "fcos_resnet50_fpn",
    "lightning_module",
}
AUXILIARY = {"googlenet": "aux"}  # heads that eval mode skips
FROZEN = {"frozen": 1, "timm_frozen": 8}


def _marked(case: Case) -> object:
    return case if case.short in QUICK else pytest.param(case, marks=pytest.mark.slow)


@pytest.mark.filterwarnings("default")  # Lightning's are not ours
@pytest.mark.parametrize(
    "case", [_marked(case) for case in CASES if case.short in QUICK | SLOW], ids=lambda case: case.short
)
def test_a_network_is_evaluated_recalibrated_and_written_back(case: Case, tmp_path: Path) -> None:
    _skip_without(case.needs)
    with detectors_computable():
        found = examine_network(case, tmp_path)
    num_loaded, num_tensors = found.loaded.split("/")
    assert num_loaded == num_tensors
    assert "BN001" in found.findings  # as the first layer was reset
    assert found.exact_error <= 1e-6
    assert found.precise_error <= 1e-12  # in float64
    assert found.same_bits
    assert (found.before is None) == (not case.classifies) == (found.repaired is None)
    if case.short in AUXILIARY:
        assert found.skipped
        assert all(name.startswith(AUXILIARY[case.short]) for name in found.skipped)
    else:
        assert len(found.skipped) == FROZEN.get(case.short, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT)
def test_a_network_without_batch_norm_is_refused_in_words(name: str, tmp_path: Path) -> None:
    _skip_without("timm" if name.startswith("timm:") else None)
    assert refusal(name, tmp_path).startswith("no BatchNorm layer with running statistics in it, but ")


def _skip_without(library: str | None) -> None:
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
