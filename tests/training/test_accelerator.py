"""Steps on a GPU, without one: nothing waits for the device, and bad numbers are found late but exactly."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bncli import load_config
from bncli.data import Split
from bncli.training import prepare
from bncli.training.last_good_step import LastGoodStep
from bncli.training.loop import check_steps, take_step
from bncli.training.run import Run

RECIPE = [
    "train.optimizer=muon",
    "train.micro_batch_size=25",
    "augment.small_epochs=1",
    "augment.cutout=4",
    "model.whitening=true",
    "train.ema_epochs=0.5",
]


class CopiesToTheDevice(TorchDispatchMode):
    """Counts copies from the CPU to another device: on a GPU each is a call of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].device.type == "cpu" and found.device.type != "cpu"
        return found


@pytest.fixture
def run_on_meta(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run on PyTorch's meta device, whose tensors have no values: whoever asks for one gets an error."""
    # it has no autocast; and an epoch reads each layer's number of batches before its first step
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("bncli.batchnorm.tracking._num_batches", lambda _: 0)
    monkeypatch.setattr("bncli.batchnorm.tracking._float64_copies", lambda _: [])
    setup = prepare(load_config(tiny_config, RECIPE))
    runtime = replace(setup.runtime, device=torch.device("meta"))
    train_split = Split(setup.dataset.train.images.to("meta"), setup.dataset.train.labels.to("meta"))
    dataset = replace(setup.dataset, train=train_split)
    return Run.start(replace(setup, runtime=runtime, dataset=dataset, model=setup.model.to("meta")))


def test_no_step_waits_for_the_device_and_only_the_check_does(run_on_meta: Run) -> None:
    run, last_good = run_on_meta, LastGoodStep(run_on_meta)
    run.model.train()
    for images, labels in run.batches():
        assert (images.device.type, labels.device.type) == ("meta", "meta")
        take_step(run, last_good, images, labels)
    assert last_good.num_unchecked == run.setup.plan.num_steps > 2
    with pytest.raises(RuntimeError, match="meta"):
        check_steps(run, last_good)


def test_a_batch_takes_only_small_copies_to_the_device(run_on_meta: Run) -> None:
    batches = run_on_meta.batches()
    next(batches)  # with the order of the epoch
    with CopiesToTheDevice() as copies:
        next(batches)
    assert copies.count == 5  # two shifts, flips, centres and colour of the erased squares; no pixel
