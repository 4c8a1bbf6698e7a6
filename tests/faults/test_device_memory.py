"""A device without room for the next step: one line that says what to do, and no step before it is lost."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bncli.checkpoints import load_checkpoint
from bncli.config_file import load_config
from bncli.training import train
from bncli.training.loop import training_step
from tests.conftest import Bncli
from tests.faults.conftest import same_run

# as PyTorch 2.13 words it
FULL_CARD = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 13.94"
    " GiB is free. Including non-PyTorch memory, this process has 125.80 GiB memory in use. Of the allocated"
    " memory 125.00 GiB is allocated by PyTorch.\nIf reserved but unallocated memory is large try setting"
    " PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
# asking for as much would move this process to another heap of the C library, which other tests look at
FULL_CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    " allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
FULL_LIBRARY = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (
            torch.OutOfMemoryError(FULL_CARD),
            "GPU 0 has a total capacity of 139.81 GiB of which 13.94 GiB is free",
        ),
        (RuntimeError(FULL_LIBRARY), FULL_LIBRARY),
        (RuntimeError(FULL_CPU), FULL_CPU),
    ],
)
def test_a_full_device_is_told_in_one_line(
    bncli: Bncli,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    known: str,
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("bncli.training.loop.training_step", full)
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "run")
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if "error:" in line]
    assert line.startswith("bncli: error: out of memory; try smaller batches (train.micro_batch_size, ")
    assert line.endswith(known)
    assert "bug" not in line


def test_steps_before_the_one_without_room_are_saved_and_resumed(
    faulty_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sixth_has_no_room(run: Any, images: torch.Tensor, labels: torch.Tensor) -> Any:
        result = training_step(run, images, labels)
        if run.step == 6:
            raise torch.OutOfMemoryError(FULL_CARD)
        return result

    config = load_config(faulty_config, ["train.checkpoint_unit=epochs", "train.checkpoint_every=5"])
    monkeypatch.setattr("bncli.training.loop.training_step", sixth_has_no_room)
    with pytest.raises(torch.OutOfMemoryError):
        train(config, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == 5
    monkeypatch.undo()
    train(config, tmp_path / "run", resume=True)
    train(config, tmp_path / "whole")
    assert same_run(tmp_path / "run", tmp_path / "whole")
