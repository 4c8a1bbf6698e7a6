"""The callback in the real Lightning."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bncli.errors import BncliError
from bncli.torchvision_compat import import_torchvision

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # its warnings are not ours

import_torchvision()  # torchmetrics, which Lightning imports, imports it too
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint

    from bncli.lightning import RecalibrateBeforeValidation

IMAGES = torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 2
DATA = TensorDataset(IMAGES, torch.arange(80) % 5)


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 5)
        )
        self.validated: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        assert not self.net[1].training
        self.validated.append(self.net[1].running_mean.clone())
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(folder: Path, *callbacks: Any, precision: Any = "32-true") -> tuple[Classifier, Trainer]:
    seed_everything(5, verbose=False)
    model = Classifier()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=2,
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, ModelCheckpoint(folder, filename="last")],
    )
    training = DataLoader(DATA, batch_size=20, shuffle=True)
    trainer.fit(model, training, DataLoader(DATA, batch_size=40))
    return model, trainer


def population_mean(weights: dict[str, Tensor]) -> Tensor:
    conv = nn.Conv2d(3, 4, 3).double()
    conv.load_state_dict({name: weights[f"net.0.{name}"].double() for name in ("weight", "bias")})
    with torch.no_grad():
        return conv(IMAGES.double()).mean((0, 2, 3))


def test_what_is_validated_and_saved_are_population_statistics(tmp_path: Path) -> None:
    model, trainer = fit(tmp_path, RecalibrateBeforeValidation(DataLoader(DATA, batch_size=32)))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    expected = population_mean(saved)
    torch.testing.assert_close(saved["net.1.running_mean"].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.validated[-1].double(), expected, rtol=1e-5, atol=1e-6)
    logged = trainer.logged_metrics
    assert {f"batch_norm/{name}" for name in ("mean_shift", "var_ratio_min", "var_ratio_max")} <= set(logged)
    assert logged["batch_norm/mean_shift"] > 0.01  # 8 steps of momentum 0.1: far from forgotten
    # the sanity check came before the first step, and saw what the network started with
    assert torch.equal(model.validated[0], torch.zeros(4))


def test_training_has_the_same_bits_with_it(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path / "a")
    with_it, _ = fit(tmp_path / "b", RecalibrateBeforeValidation(lambda: DataLoader(DATA, 32, shuffle=True)))
    for one, other in zip(plain.parameters(), with_it.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_measures_in_the_precision_of_the_trainer(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    callback = RecalibrateBeforeValidation(DataLoader(DATA, batch_size=32))
    seed_everything(5, verbose=False)

    class Watching(Classifier):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            seen.append(logits.dtype)
            return logits

    model = Watching()
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, precision="bf16-mixed", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[callback], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, DataLoader(DATA, batch_size=20), DataLoader(DATA, batch_size=40))
    assert set(seen) == {torch.bfloat16}


def test_validate_alone_changes_nothing(tmp_path: Path) -> None:
    model, trainer = fit(tmp_path, RecalibrateBeforeValidation(DataLoader(DATA, batch_size=32)))
    nn.init.constant_(model.net[1].running_mean, 3.0)
    trainer.validate(model, DataLoader(DATA, batch_size=40), verbose=False)
    assert torch.equal(model.net[1].running_mean, torch.full((4,), 3.0))


def test_the_older_package_gets_its_own_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.delitem(sys.modules, "bncli.lightning")
    monkeypatch.delitem(sys.modules, "lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pytorch_lightning
    module = importlib.import_module("bncli.lightning")
    assert issubclass(module.RecalibrateBeforeValidation, pytorch_lightning.Callback)


def test_a_module_without_forward_is_told_what_it_lacks(tmp_path: Path) -> None:
    class Headless(Classifier):
        forward = LightningModule.forward

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, _: int) -> None:
            self.net(batch[0])

    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
        callbacks=[RecalibrateBeforeValidation(DataLoader(DATA, batch_size=32))],
    )  # fmt: skip
    with pytest.raises(BncliError, match="write it: def forward"):
        trainer.fit(Headless(), DataLoader(DATA, batch_size=20), DataLoader(DATA, batch_size=40))
