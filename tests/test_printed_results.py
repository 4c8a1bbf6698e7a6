"""`print` of what the public functions return: a few lines that a person can read."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bncli
from bncli.batchnorm import compare
from bncli.config import SyntheticConfig
from bncli.torchvision_compat import import_torchvision

IMAGES = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LOADER = DataLoader(TensorDataset(IMAGES, torch.arange(12)), batch_size=6)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return import_torchvision().models.resnet18()  # 1,000 classes, 20 layers


@pytest.fixture(scope="module")
def file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("printed") / "resnet18.pt"
    torch.save(network.state_dict(), path)
    return path


RESULTS: dict[str, Callable[[nn.Module], object]] = {
    "evaluate": lambda model: bncli.evaluate(model, LOADER),
    "certify": lambda model: bncli.certify(model, IMAGES[:2], batch_sizes=(2,)),
    "measure_gap": lambda model: bncli.measure_gap(model, LOADER, LOADER),
    "examine": lambda model: bncli.examine(model, LOADER, LOADER, num_images=2, sweep=(2,)),
    "measure_population": lambda model: bncli.measure_population(model, LOADER, method="precise"),
    "one layer's population": lambda model: bncli.measure_population(model, LOADER, method="precise").layers[
        0
    ],
    "recalibrate": lambda model: bncli.recalibrate(model, LOADER, method="precise"),
    "Moments": lambda _: bncli.Moments.of(IMAGES),
    "fold_batch_norm": lambda model: bncli.fold_batch_norm(model.eval()),
    "load_dataset": lambda _: bncli.load_dataset(SyntheticConfig(num_train=20, num_test=10)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_a_few_lines(network: nn.Module, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print(RESULTS[name](network))
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 20
    assert len(text) < 2_000
    assert "object at 0x" not in text
    assert "tensor(" not in text
    assert re.search(r"\d", text)


def test_a_layer_and_a_finding_are_a_line_each(network: nn.Module) -> None:
    layers = bncli.read_running_stats(network)
    assert len(str(layers)) < 160 * len(layers)
    broken = nn.BatchNorm1d(2)
    broken.running_var[0] = torch.nan
    (finding,) = bncli.audit(broken)
    assert str(finding).startswith(
        "BN003 error in the module itself: channel 0 of 2: NaN or infinity in running_var."
    )
    assert str(bncli.read_running_stats(broken)[0]) == (
        "LayerStats('': 2 channels, 0 batches tracked, running_mean 0 to 0, running_var nan to nan)"
    )


def test_files_are_a_line_each(file: Path, finished_run: Path) -> None:
    with bncli.open_checkpoint(file) as one, bncli.open_checkpoint(file) as other:
        assert str(one) == f"OpenCheckpoint({str(file)!r}, torch zip: 122 tensors, 20 BatchNorm layers)"
        assert len(str(compare(one, other)).splitlines()) < 20
    text = str(bncli.load_checkpoint(finished_run / "last.pt"))
    assert text.startswith("Checkpoint(")
    assert "10 classes of synthetic, after epoch 2, test accuracy" in text
    assert len(text) < 200
