"""`bncli.audit` takes whatever holds the layers; the audit of the layers themselves is the oracle."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bncli import audit, read_running_stats
from bncli.batchnorm import audit_layers
from bncli.errors import CheckpointError


@pytest.fixture
def broken() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    for _ in range(60):
        model(torch.randn(8, 3, 8, 8))
    model[3].running_var[1] = torch.nan
    return model


def test_a_module_a_state_dict_a_path_and_layers_are_judged_alike(broken: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "broken.pt"
    torch.save(broken.state_dict(), path)
    expected = audit_layers(read_running_stats(broken.state_dict()))
    assert [(found.code, found.layer, found.channels) for found in expected] == [("BN003", "3", (1,))]
    assert audit(broken.state_dict()) == audit(path) == audit(str(path)) == expected
    layers = read_running_stats(broken)
    assert audit(broken) == audit(layers) == audit(iter(layers)) == audit_layers(layers)
    assert audit(broken[3])[0].code == "BN003"
    assert audit(nn.Sequential()) == audit([]) == ()
    assert audit(path, ignore=["non_finite"]) == ()


def test_what_holds_no_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pt"):
        audit(tmp_path / "nowhere.pt")
    for wrong in (3, [torch.zeros(3)]):
        with pytest.raises(TypeError, match="expected"):
            audit(wrong)  # type: ignore[arg-type]
