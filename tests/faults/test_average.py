"""Averaged weights in runs that are stopped, break or are forged: they are kept and undone with the rest."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bncli.checkpoints import load_checkpoint
from bncli.config_file import load_config
from bncli.errors import DivergedError, StoppedError
from bncli.training import Setup, StepDone, prepare, train
from tests.conftest import Bncli
from tests.faults.conftest import content_of, resume_forged, same_run

EMA = "train.ema_epochs=0.5"  # 2 steps


@pytest.fixture(scope="module")
def averaged_run(faulty_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "averaged_faulty"
    train(load_config(faulty_config, [EMA]), run_dir)
    return run_dir


@pytest.mark.parametrize("call", [1, 3, 6, 9, 10, 11, 12, 40])
def test_a_run_stopped_anywhere_ends_with_the_bits_of_an_uninterrupted_one(
    faulty_config: Path, averaged_run: Path, tmp_path: Path, call: int
) -> None:
    """Asked after each of 4 steps, of 4 batches that are measured, and before the test batch of an epoch."""
    config = load_config(faulty_config, [EMA])
    calls = iter(range(1, 100))
    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", stop=lambda: next(calls) == call)
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last.step == call // 9 * 4 + min(call % 9, 4)
    assert last.test_accuracy is None
    assert last.averaging is not None
    # not evaluated: what the last step left, whose running statistics are its own
    assert all(torch.equal(value, last.averaging["last"][key]) for key, value in last.state_dict.items())
    train(config, tmp_path / "run", resume=True)
    assert same_run(averaged_run, tmp_path / "run")


@pytest.mark.parametrize("steps_between_checks", [1, 100])
def test_a_bad_step_has_no_part_in_the_average(
    faulty_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_between_checks: int
) -> None:
    monkeypatch.setattr(Setup, "steps_between_checks", steps_between_checks)
    config = load_config(faulty_config, [EMA, "train.checkpoint_unit=epochs"])
    steps: list[int] = []

    def count(event: object) -> None:
        if isinstance(event, StepDone):
            steps.append(event.step)

    with pytest.raises(StoppedError):
        train(config, tmp_path / "expected", report=count, stop=lambda: steps[-1:] == [5])

    def prepare_broken(*arguments: object, **options: object) -> Setup:
        setup = prepare(*arguments, **options)
        norm = setup.model.stages[0][0].norm

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("nan") if norm.num_batches_tracked == 6 else gradient

        setup.model.head.weight.register_hook(spoil)
        return setup

    monkeypatch.setattr("bncli.training.open_run.prepare", prepare_broken)
    with pytest.raises(DivergedError, match="in step 6 "):
        train(config, tmp_path / "run")
    found, expected = (content_of(tmp_path / name / "last.pt") for name in ("run", "expected"))
    assert any(key.startswith("averaging.average.") for key in found)
    assert {key for key in found if found[key] != expected[key]} <= {"plain values"}  # the learning rate


def test_an_average_that_cannot_be_measured_ends_the_run_and_loses_no_step(
    bncli: Bncli, faulty_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare_broken(*arguments: object, **options: object) -> Setup:
        setup = prepare(*arguments, **options)

        def overflow(module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            return output if torch.is_grad_enabled() else output * float("inf")

        setup.model.stages[0][0].conv.register_forward_hook(overflow)
        return setup

    monkeypatch.setattr("bncli.training.open_run.prepare", prepare_broken)
    outcome = bncli("train", faulty_config, "--run-dir", tmp_path / "run", "--set", EMA)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith(
        "bncli: error: the average of the weights cannot be measured:"
    )
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(averaging=None), "does not fit"),
        (lambda c: c["averaging"].pop("average"), "averaging: expected two state dicts"),
        (lambda c: c["averaging"].update(last={}), "does not fit"),
        (lambda c: c["averaging"]["average"].pop("head.bias"), "does not fit"),
        (lambda c: c["averaging"]["average"].update({"head.bias": torch.zeros(1)}), "head.bias is not like"),
        (lambda c: c["averaging"]["average"].update({"head.bias": 1}), "averaging: expected two state dicts"),
    ],
)
def test_a_forged_average_is_refused_in_one_line(
    bncli: Bncli,
    averaged_run: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    said: str,
) -> None:
    shutil.copytree(averaged_run, tmp_path / "run")
    outcome = resume_forged(bncli, tmp_path / "run", change)
    errors = [line for line in outcome.err.splitlines() if "draw images" not in line]
    assert (outcome.code, len(errors)) == (2, 1), outcome.err
    assert said in errors[0]
