"""A program for torchrun: Lightning's own `ddp` with our callback, which leaves what each rank validated.

torchrun ... -m tests.distributed.lightning_worker FOLDER
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bncli.torchvision_compat import import_torchvision

import_torchvision()  # torchmetrics, which Lightning imports, imports it too
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch import LightningModule, Trainer, seed_everything

    from bncli.lightning import RecalibrateBeforeValidation

NUM_IMAGES = 45  # which DistributedSampler fills up to 46
IMAGES = torch.randn(NUM_IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 2
DATA = TensorDataset(IMAGES, torch.arange(NUM_IMAGES) % 5)


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)
        ).double()
        self.validated: list[dict[str, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.double())

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, number: int) -> None:
        if number == 0:
            self.validated.append({name: value.clone() for name, value in self.net.state_dict().items()})
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(folder: Path, callbacks: list[Any]) -> tuple[Classifier, Trainer]:
    seed_everything(5, verbose=False)
    model = Classifier()
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", strategy="ddp", devices=int(os.environ["WORLD_SIZE"]),
        max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(model, DataLoader(DATA, batch_size=8, shuffle=True), DataLoader(DATA, batch_size=8))
    return model, trainer


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    plain, _ = fit(folder, [])
    callback = RecalibrateBeforeValidation(DataLoader(DATA, batch_size=8, shuffle=True))
    model, trainer = fit(folder, [callback])
    same = all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    found = {"validated": model.validated, "logged": logged, "training is the same": same}
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
