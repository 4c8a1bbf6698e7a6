"""Ctrl-C, SIGTERM and `stop`: the step is finished and saved, and the resumed run ends with the same bits."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bncli.batchnorm import EpochStatistics
from bncli.checkpoints import check_integrity, load_checkpoint
from bncli.cli.progress import ProgressReporter, TrainReporter
from bncli.config_file import load_config
from bncli.errors import StoppedError
from bncli.training import EpochDone, Setup, StepDone, train
from bncli.training.optimizer import Optimizer
from tests.conftest import Bncli
from tests.faults.conftest import content_of, same_run

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def signals_are_not_ignored() -> Iterator[None]:
    """Under nohup, or as a background job, pytest starts with SIGINT ignored, and so would these runs."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Let something happen in the command line when a step is reported, the first time."""

    def arrange(step: int, action: Callable[[], None]) -> None:
        original, happened = TrainReporter.__call__, []

        def call(self: TrainReporter, event: object) -> None:
            original(self, event)
            if isinstance(event, StepDone) and event.step == step and not happened:
                happened.append(True)
                action()

        monkeypatch.setattr(TrainReporter, "__call__", call)

    return arrange


def stop_at(call: int) -> Callable[[], bool]:
    calls = iter(range(1, 10_000))
    return lambda: next(calls) >= call


@pytest.mark.parametrize("steps_between_checks", [1, 100])
@pytest.mark.parametrize(("call", "step"), [(1, 1), (3, 3), (4, 4), (5, 4), (7, 6), (25, 20)], ids=str)
def test_a_run_that_was_asked_to_stop_saves_its_last_step_and_ends_like_one_that_was_not(
    faulty_config: Path,
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    step: int,
    steps_between_checks: int,
) -> None:
    """Asked after each of 4 steps and before the one test batch: the 5th time is in the evaluation."""
    monkeypatch.setattr(Setup, "steps_between_checks", steps_between_checks)
    config = load_config(faulty_config)
    with pytest.raises(StoppedError, match=f"stopped after step {step} of 20; continue with: bncli train"):
        train(config, tmp_path / "run", stop=stop_at(call))
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (last.step, last.test_accuracy) == (step, None)
    train(config, tmp_path / "run", resume=True)
    assert same_run(whole_run, tmp_path / "run")


def test_a_keyboard_interrupt_within_a_step_loses_no_finished_step(
    faulty_config: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted when half of the weights have been updated and the running statistics already are."""
    config = load_config(faulty_config)
    with pytest.raises(StoppedError):
        train(config, tmp_path / "expected", stop=stop_at(6))  # after step 5
    original, calls = Optimizer.step, iter(range(1, 100))

    def half_a_step(self: Optimizer) -> None:
        original(self)
        if next(calls) == 6:
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(3)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", half_a_step)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    found, expected = (content_of(tmp_path / name / "last.pt") for name in ("run", "expected"))
    # the learning rate of the step that was not taken is set anew by the next
    assert {key for key in found if found[key] != expected[key]} <= {"plain values"}
    train(config, tmp_path / "run", resume=True)
    assert same_run(whole_run, tmp_path / "run")


@pytest.mark.parametrize(("is_within_the_step", "kept"), [(False, 7), (True, 4)])
def test_a_keyboard_interrupt_on_a_gpu_keeps_whole_steps_if_they_are_good(
    faulty_config: Path,
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_within_the_step: bool,
    kept: int,
) -> None:
    """Of 4 steps an epoch the 7th is interrupted after it, or within: then it goes back to the last check."""
    monkeypatch.setattr(Setup, "steps_between_checks", 100)
    config, calls = load_config(faulty_config, ["train.checkpoint_unit=epochs"]), iter(range(1, 100))
    original = EpochStatistics.observe

    def observe(self: EpochStatistics) -> None:
        original(self)
        if next(calls) == 7 and is_within_the_step:
            raise KeyboardInterrupt

    def interrupt(event: object) -> None:
        if isinstance(event, StepDone) and event.step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EpochStatistics, "observe", observe)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", report=interrupt)
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == kept
    train(load_config(faulty_config), tmp_path / "run", resume=True)
    # best.pt may be of before, with the other interval in its configuration
    assert content_of(whole_run / "last.pt") == content_of(tmp_path / "run" / "last.pt")


def test_a_keyboard_interrupt_while_a_step_is_counted_counts_it_once(
    faulty_config: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, calls = load_config(faulty_config), iter(range(1, 100))
    original = EpochStatistics.observe

    def observe(self: EpochStatistics) -> None:
        original(self)
        if next(calls) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EpochStatistics, "observe", observe)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == 5
    train(config, tmp_path / "run", resume=True)
    assert same_run(whole_run, tmp_path / "run")


def test_an_interrupt_after_an_epoch_keeps_its_evaluated_checkpoint(
    faulty_config: Path, tmp_path: Path
) -> None:
    def interrupt(event: object) -> None:
        if isinstance(event, EpochDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(load_config(faulty_config), tmp_path / "run", report=interrupt)
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (last.step, last.epoch, last.running_epoch) == (4, 1, None)
    assert last.test_accuracy is not None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    bncli: Bncli, faulty_config: Path, whole_run: Path, tmp_path: Path, at_step, number: int, code: int
) -> None:
    before = signal.getsignal(number)
    at_step(5, lambda: signal.raise_signal(number))
    outcome = bncli("train", faulty_config, "--run-dir", tmp_path / "run")
    assert outcome.code == code
    assert outcome.out == ""
    assert outcome.err.splitlines()[-1] == (
        f"bncli: stopped after step 5 of 20; continue with: bncli train --resume {tmp_path / 'run'}"
    )
    assert signal.getsignal(number) is before
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == 5
    resumed = bncli("train", "--resume", tmp_path / "run")
    assert resumed.code == 0
    assert "Resuming after step 5 of 20, in epoch 2" in resumed.err
    assert same_run(whole_run, tmp_path / "run")


def test_a_second_signal_stops_at_once_and_the_checkpoint_before_stays_whole(
    bncli: Bncli, faulty_config: Path, whole_run: Path, tmp_path: Path, at_step
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(5, twice)
    outcome = bncli("train", faulty_config, "--run-dir", tmp_path / "run")
    assert outcome.code == 130
    assert "interrupted; continue with: bncli train --resume" in outcome.err
    found = check_integrity(tmp_path / "run" / "last.pt")
    assert (found.digest_matches, found.step) == (True, 4)  # that of the end of epoch 1
    assert bncli("train", "--resume", tmp_path / "run").code == 0
    assert same_run(whole_run, tmp_path / "run")


def test_a_signal_while_the_data_are_loaded_leaves_nothing_behind(
    bncli: Bncli, faulty_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProgressReporter, "__call__", lambda *_: signal.raise_signal(signal.SIGTERM))
    outcome = bncli("train", faulty_config, "--run-dir", tmp_path / "run")
    assert outcome.code == 143
    assert outcome.err == "bncli: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(
    bncli: Bncli, faulty_config: Path, tmp_path: Path, at_step
) -> None:
    at_step(5, lambda: signal.raise_signal(signal.SIGINT))
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    try:
        assert bncli("train", faulty_config, "--run-dir", tmp_path / "run").code == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_process_exits_with_the_code_of_its_signal(
    faulty_config: Path, tmp_path: Path, number: int, code: int
) -> None:
    command = [sys.executable, "-m", "bncli", "train", str(faulty_config), "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*command, "--set", "train.epochs=1000"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "run" / "last.pt").exists():
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in error
    assert "continue with: bncli train --resume" in error.splitlines()[-1]
