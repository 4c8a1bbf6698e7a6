"""NaN and infinity: noticed in the step, traced to a layer, and never saved."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bncli.checkpoints import check_integrity
from bncli.config_file import load_config
from bncli.errors import DivergedError, StoppedError
from bncli.training import train
from bncli.training.bad_numbers import all_finite
from bncli.training.setup import Setup, prepare
from tests.conftest import Bncli
from tests.faults.conftest import content_of

GOOD_STEPS = 5  # before the bad one; a step checkpoint is due after 3 and 6


def is_bad_step(model: nn.Module) -> bool:
    """Whether the step after GOOD_STEPS runs; true again when it is run once more from where it began.

    Told by a layer that has not seen the batch yet.
    """
    return model.training and int(model.stages[1][0].norm.num_batches_tracked) == GOOD_STEPS


def break_output(model: nn.Module) -> None:
    def to_infinity(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        return output * float("inf") if is_bad_step(model) else None

    model.stages[0][0].conv.register_forward_hook(to_infinity)


def break_statistics(model: nn.Module) -> None:
    """The batch's variance overflows, the normalised output becomes 0, and the loss stays finite."""

    def enlarge(_module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        return (inputs[0].float() * 1e25,) if is_bad_step(model) else None

    model.stages[0][0].norm.register_forward_pre_hook(enlarge)


def break_gradient(model: nn.Module) -> None:
    def to_nan(gradient: torch.Tensor) -> torch.Tensor | None:
        # the forward pass has counted the batch by now
        seen = int(model.stages[1][0].norm.num_batches_tracked)
        return gradient * float("nan") if seen == GOOD_STEPS + 1 else None

    for block in (model.stages[0][0], model.stages[1][0]):  # it flows on to the earlier layer
        block.conv.weight.register_hook(to_nan)


def break_loss(model: nn.Module) -> None:
    def huge(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        if not (model.training and int(model.stages[1][0].norm.num_batches_tracked) == GOOD_STEPS + 1):
            return None
        return torch.where(torch.arange(10) == 0, 3e38, -3e38) + 0 * output

    model.head.register_forward_hook(huge)


@pytest.mark.parametrize(
    ("precision", "steps_between_checks"), [("float32", 1), ("bfloat16", 1), ("float32", 100)]
)
@pytest.mark.parametrize(
    ("fault", "origin"),
    [
        (break_output, r"it began in the output of stages\.0\.0\.conv"),
        (break_statistics, r"it began in stages\.0\.0\.norm\.running_var"),
        (break_gradient, r"it began in the gradient of stages\.1\.0\.conv\.weight"),
        (break_loss, r"it began in the loss"),
    ],
)
def test_a_number_that_is_not_finite_stops_the_run_at_the_last_good_step(
    faulty_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[nn.Module], None],
    origin: str,
    precision: str,
    steps_between_checks: int,
) -> None:
    """Checked after every step, as on a CPU; or as on a GPU, at the end of the epoch: two steps later."""
    monkeypatch.setattr(Setup, "steps_between_checks", steps_between_checks)
    due = [] if steps_between_checks == 1 else ["train.checkpoint_unit=epochs"]
    config = load_config(faulty_config, [f"runtime.precision={precision}", *due])
    calls = iter(range(1, 100))
    with pytest.raises(StoppedError):  # after 4 steps and a test batch comes the 5th step
        train(config, tmp_path / "expected", stop=lambda: next(calls) == GOOD_STEPS + 1)

    def prepare_broken(*arguments: object, **options: object) -> Setup:
        setup = prepare(*arguments, **options)
        fault(setup.model)
        return setup

    monkeypatch.setattr("bncli.training.open_run.prepare", prepare_broken)
    with pytest.raises(DivergedError, match=rf"in step 6 \(epoch 2\), at a learning rate of .*: {origin}"):
        train(config, tmp_path / "run")
    found, expected = (content_of(tmp_path / name / "last.pt") for name in ("run", "expected"))
    # the learning rate of the step that was undone is set anew by the next; every tensor is the same
    assert {key for key in found if found[key] != expected[key]} <= {"plain values"}
    assert check_integrity(tmp_path / "run" / "last.pt").step == GOOD_STEPS
    assert content_of(tmp_path / "run" / "best.pt") == content_of(tmp_path / "expected" / "best.pt")


def test_the_part_of_a_batch_that_makes_the_number_is_found(
    faulty_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(faulty_config)
    halves = config.train.model_copy(update={"micro_batch_size": -(-config.train.batch_size // 2)})

    def to_infinity(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        seen = int(setups[-1].model.stages[0][0].norm.num_batches_tracked)
        is_bad = setups[-1].model.training and seen == 2 * GOOD_STEPS + 1  # the second half of step 6
        return output * float("inf") if is_bad else None

    setups: list[Setup] = []

    def prepare_broken(*arguments: object, **options: object) -> Setup:
        setups.append(prepare(*arguments, **options))
        setups[-1].model.stages[0][0].conv.register_forward_hook(to_infinity)
        return setups[-1]

    monkeypatch.setattr("bncli.training.open_run.prepare", prepare_broken)
    with pytest.raises(DivergedError, match=r"in step 6 .*: it began in the output of stages\.0\.0\.conv;"):
        train(config.model_copy(update={"train": halves}), tmp_path / "run")
    assert check_integrity(tmp_path / "run" / "last.pt").step == GOOD_STEPS


def test_a_learning_rate_that_is_far_too_high_is_answered_with_one_line(
    bncli: Bncli, faulty_config: Path, tmp_path: Path
) -> None:
    override = ["--set", "train.learning_rate=1e38", "--set", "train.warmup=0"]
    outcome = bncli("train", faulty_config, "--run-dir", tmp_path / "run", *override)
    assert outcome.code == 2
    line = outcome.err.splitlines()[-1]
    assert line.startswith("bncli: error: not a finite number in step ")
    assert "start again with a lower train.learning_rate" in line
    assert check_integrity(tmp_path / "run" / "last.pt").non_finite == ()
    assert not (tmp_path / "run" / "best.pt").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["loss", "weight", "running_mean", "running_var"])
def test_one_number_anywhere_is_noticed(place: str, value: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    loss = torch.tensor(1.0)
    assert all_finite(model, loss)
    with torch.no_grad():
        targets = {"loss": loss, "weight": model[0].weight.view(-1)[3]}
        targets.get(place, getattr(model[1], place if place.startswith("running") else "bias")[2]).fill_(
            value
        ) if place not in {"loss", "weight"} else targets[place].fill_(value)
    assert not all_finite(model, loss)


def test_large_finite_numbers_are_no_reason_to_stop() -> None:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, 3e38)  # whose squares are not finite
    assert all_finite(model, torch.tensor(3e38))
