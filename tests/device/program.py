"""Everything that computes on a device, here and on the simulated one: what came out, as JSON by name."""

import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bncli import (
    FixedShape,
    audit,
    certify,
    evaluate,
    examine,
    load_config,
    measure_gap,
    optimize_for_inference,
    recalibrate,
)
from bncli.batchnorm import verify_fixed_point
from bncli.checkpoints import Checkpoint
from bncli.training import prepare
from bncli.training.last_good_step import LastGoodStep
from bncli.training.loop import _take_unchecked, check_steps
from bncli.training.run import Run
from tests.device import simulated

RECIPE = """
data: {name: synthetic, num_train: 100, num_test: 24}
augment: {crop_padding: 2, flip: alternating, cutout: 8, crop_epochs: 1, crop_size: 24}
model: {widths: [4, 8], blocks_per_stage: 2, whitening: true, pool_before_norm: true}
train: {epochs: 2, batch_size: 50, optimizer: muon, learning_rate: 0.05, micro_batch_size: 25}
runtime: {device: cpu, precision: float32, threads: 1}
"""


def main(folder: Path) -> None:
    """Print the document."""
    (folder / "recipe.yaml").write_text(RECIPE)
    there = simulated.install()
    trained = {device.type: train(folder, device) for device in (torch.device("cpu"), there)}
    weights = [checkpoint.state_dict for checkpoint, _, _ in trained.values()]
    found: dict[str, Any] = {
        "weights have the same bits": all(map(torch.equal, *(one.values() for one in weights))),
        "test losses": [checkpoint.test_loss for checkpoint, _, _ in trained.values()],
        "types in a checkpoint": sorted({type(one).__name__ for one in weights[1].values()}),
        "waits of a step": trained[simulated.NAME][2],
        "mixing is refused": is_mixing_refused(there),
    }
    _, run, _ = trained["cpu"]
    model, test = run.model.eval(), run.setup.dataset.test
    images, labels = test.images, test.labels  # type: ignore[attr-defined]
    batches = list(images.split(7))
    labelled = list(zip(batches, labels.split(7), strict=True))

    def examined(network: nn.Module) -> Any:
        options: dict[str, Any] = {"num_images": 8, "batch_sizes": (2, 3), "batch_size": 7, "sweep": (2, 5)}
        done = examine(network, (images, labels), batches, views="shifts", **options)
        points = [str(point) for point in done.sweep]
        return done.evaluation.accuracy, points, done.tta and done.tta.accuracy, done.certificate.to_dict()

    def recalibrated(network: nn.Module) -> Any:
        recalibrate(network, batches, method="exact")
        largest = max(layer.max_relative_error for layer in verify_fixed_point(network, batches))
        return largest < 1e-6, str(recalibrate(network, batches, method="precise"))

    measures: dict[str, Callable[[nn.Module], Any]] = {
        "evaluate": lambda network: evaluate(network, labelled).loss,
        "certify": lambda network: certify(network, images, batch_sizes=(2, 7)).to_dict(),
        "fixed shape": lambda network: certify(FixedShape(network, 8), images, batch_sizes=(2, 7)).to_dict(),
        "recalibrate": recalibrated,
        "debias": lambda network: str(recalibrate(network, method="debias")),
        "gap": lambda network: str(measure_gap(network, labelled, batches)),
        "examine": examined,
        "audit": lambda network: [str(one) for one in audit(network)],
        # nothing is folded there: weights that are no plain tensors are left alone
        "inference": lambda network: predicted(optimize_for_inference(network), _placed(images, network)),
    }
    for name, measure in measures.items():
        found[name] = [measure(copy.deepcopy(model).to(device)) for device in (torch.device("cpu"), there)]
    print(json.dumps(found))


def train(folder: Path, device: torch.device) -> tuple[Checkpoint, Run, dict[str, int]]:
    """Two epochs; the checkpoint, the run, and what the second step of an epoch waited for."""
    setup = prepare(load_config(folder / "recipe.yaml"))
    runtime = replace(setup.runtime, device=device)
    images, labels = setup.dataset.train.images, setup.dataset.train.labels  # type: ignore[attr-defined]
    on_device = replace(setup.dataset.train, images=images.to(device), labels=labels.to(device))  # type: ignore[type-var]
    dataset = replace(setup.dataset, train=on_device)
    setup = replace(setup, runtime=runtime, dataset=dataset, model=runtime.place_model(setup.model))
    run = Run.start(setup)
    last_good, waits = LastGoodStep(run), {}
    while run.epoch < setup.config.train.epochs:
        run.model.train()
        for images, labels in run.batches():
            _take_unchecked(run, last_good, images, labels)
            waits = dict(simulated.waits)
            simulated.waits.clear()
        check_steps(run, last_good)
        evaluation = run.evaluate(run.model, lambda: False)
        run.end_epoch(evaluation)
    return run.checkpoint(run.model, evaluation), run, waits


def is_mixing_refused(device: torch.device) -> bool:
    """Whether the device is one."""
    try:
        torch.ones(2, device=device) + torch.ones(2)
    except simulated.MixedDevicesError:
        return True
    return False


def predicted(network: nn.Module, images: torch.Tensor) -> list[int]:
    """The classes."""
    classes: list[int] = network(images).argmax(1).cpu().tolist()
    return classes


def _placed(images: torch.Tensor, network: nn.Module) -> torch.Tensor:
    return images.to(next(network.parameters()).device)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # past what a backend written in Python leaves behind
