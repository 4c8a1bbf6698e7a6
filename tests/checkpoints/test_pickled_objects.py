"""Files with whole objects in them: lazy networks, modules of foreign classes, pickled trainers."""

import sys
import types
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bncli.audit import audit
from bncli.checkpoints import open_checkpoint
from bncli.errors import CheckpointError, NoBatchNormError
from tests.conftest import Bncli


def lazy_network() -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(4),
        nn.LazyBatchNorm2d(),
        nn.Sequential(nn.LazyBatchNorm2d(affine=False), nn.LazyInstanceNorm2d(track_running_stats=True)),
    )


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_lazy_layers_are_named_beside_the_others(
    bncli: Bncli, tmp_path: Path, *, whole: bool, legacy: bool
) -> None:
    model = lazy_network()
    torch.save(
        model if whole else {"model": model.state_dict()},
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert [layer.name for layer in checkpoint.layers()] == ["0"]
        # a state dict does not tell a lazy InstanceNorm from a BatchNorm
        others = "1, 2.0" if whole else "1, 2.0, 2.1"
        (note,) = checkpoint.notes
        assert note == f"not yet initialised, as they are lazy and have seen no batch: {others}"
    assert note in " ".join(bncli("inspect-stats", tmp_path / "a.pt").err.split())


def test_a_lazy_layer_that_saw_a_batch_is_like_any_other(tmp_path: Path) -> None:
    model = lazy_network()
    model(torch.randn(2, 4, 3, 3))
    torch.save(model, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert [layer.name for layer in checkpoint.layers()] == ["0", "1", "2.0"]
        assert checkpoint.notes == ()


@pytest.mark.parametrize("tracking", [True, False])
def test_where_all_are_lazy_this_is_what_is_said(tmp_path: Path, *, tracking: bool) -> None:
    torch.save(nn.Sequential(nn.LazyBatchNorm2d(track_running_stats=tracking)), tmp_path / "a.pt")
    with (
        pytest.raises(
            NoBatchNormError, match=r"1 BatchNorm layer, not yet initialised \(0\); compute a batch"
        ),
        open_checkpoint(tmp_path / "a.pt"),
    ):
        pass


# ---- classes that are not there when the file is read


class Conv(nn.Module):
    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_inputs, num_outputs, 3, bias=False)
        self.bn = nn.BatchNorm2d(num_outputs, eps=1e-3, momentum=0.03)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.bn(self.conv(x)))


class DetectionModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.yaml, self.names, self.args = {"nc": 2}, {0: "a", 1: "b"}, types.SimpleNamespace(lr0=0.01)
        self.stride = torch.tensor([8.0, 16.0, 32.0])
        self.model = nn.Sequential(Conv(3, 6), nn.Sequential(Conv(6, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)  # type: ignore[no-any-return]


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.epoch, self.model = 3, nn.DataParallel(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The classes as of a package that only the machine of the training has."""
    package = types.ModuleType("ultralytics_look_alike")
    for kind in (Conv, DetectionModel, Trainer):
        monkeypatch.setattr(kind, "__module__", package.__name__)
        setattr(package, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    yield


def trained() -> tuple[DetectionModel, DetectionModel]:
    """A network and its moving average, of floating point tensors alone as Ultralytics takes it."""
    torch.manual_seed(0)
    model = DetectionModel().train()
    average = deepcopy(model).eval()
    for _ in range(60):
        model(torch.randn(4, 3, 8, 8) * 2 + 1)
        for name, tensor in average.state_dict().items():
            if tensor.is_floating_point():
                tensor.lerp_(model.state_dict()[name], 0.2)
    return model, average


def ultralytics_content(model: nn.Module | None, ema: nn.Module | None) -> dict[str, Any]:
    return {"epoch": -1, "best_fitness": None, "model": model, "ema": ema, "updates": 60, "optimizer": None,
            "train_args": {"task": "detect"}, "date": "2026-11-29", "version": "8.4.190"}  # fmt: skip


@pytest.mark.usefixtures("elsewhere")
def test_files_of_the_shape_of_ultralytics_are_read_without_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, average = trained()
    half = deepcopy(average).half()
    torch.save(ultralytics_content(half, None), tmp_path / "best.pt")
    torch.save(ultralytics_content(None, half), tmp_path / "epoch3.pt")
    torch.save(ultralytics_content(model, half), tmp_path / "both.pt")
    monkeypatch.delitem(sys.modules, "ultralytics_look_alike")
    for name, key in (("best", "model"), ("epoch3", "ema"), ("both", "ema")):
        with open_checkpoint(tmp_path / f"{name}.pt") as checkpoint:
            layers = checkpoint.layers()
        assert (checkpoint.key, checkpoint.is_whole_module) == (key, True)
        assert [(layer.name, layer.eps, layer.momentum) for layer in layers] == [
            ("model.0.bn", 1e-3, 0.03),
            ("model.1.0.bn", 1e-3, 0.03),
        ]
        for layer, expected in zip(layers, (half.model[0].bn, half.model[1][0].bn), strict=True):
            assert layer.running_var.dtype == torch.float16
            assert torch.equal(layer.running_var, expected.running_var)
            assert layer.num_batches_tracked == 0  # the average takes no integers
        # which is no reason to call the network untrained
        codes = {finding.name for finding in audit(tmp_path / f"{name}.pt")}
        assert not codes & {"never_updated", "initial_residue"}, codes


@pytest.mark.usefixtures("elsewhere")
def test_a_trainer_that_was_pickled_whole_is_searched_for_its_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = trained()
    trainer = Trainer(model)
    torch.save(trainer, tmp_path / "trainer.pt")
    torch.save({"callbacks": [], "trainer": trainer}, tmp_path / "nested.pt")
    monkeypatch.delitem(sys.modules, "ultralytics_look_alike")
    for name, key in (("trainer", "model"), ("nested", "trainer.model")):
        with open_checkpoint(tmp_path / f"{name}.pt") as checkpoint:
            assert checkpoint.key == key
            assert [layer.name for layer in checkpoint.layers()] == ["model.0.bn", "model.1.0.bn"]
            assert torch.equal(checkpoint.layers()[0].running_mean, model.model[0].bn.running_mean)
    with pytest.raises(CheckpointError, match="no tensors under the key 'optimizer'"):
        open_checkpoint(tmp_path / "trainer.pt", "optimizer").__enter__()
