"""`runtime.compile`: the same training, failures on one line, and a run that stops in mid-compiling."""

import shutil
from pathlib import Path

import pytest
import torch

from bncli.checkpoints import load_checkpoint
from bncli.config_file import load_config
from bncli.errors import CompileError, StoppedError
from bncli.training import prepare, train
from bncli.training.loop import training_step
from bncli.training.run import Run
from tests.conftest import Bncli
from tests.faults.conftest import same_run

COMPILE = "runtime.compile=true"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")


class CompilerFailedError(RuntimeError):
    """As PyTorch's: what the C++ compiler said, all of it."""

    __module__ = "torch._inductor.exc"

    def __init__(self) -> None:
        super().__init__("C++ compile error\n" + "note: in instantiation of Vectorized<T>\n" * 5000)


def fail(*_: object, **__: object) -> None:
    raise CompilerFailedError


def test_where_nothing_can_be_compiled_that_is_said_before_a_run_begins(
    bncli: Bncli, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "run", "--set", COMPILE)
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if "error" in line]
    assert line.startswith("bncli: error: runtime.compile:")
    assert line.endswith("C++ compile error; set it to false")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_step_that_cannot_be_compiled_ends_the_run_and_loses_nothing(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    def third_fails(
        run: Run, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = training_step(run, images, labels)
        if run.step == 3:
            failing.append(True)
            fail()
        return result

    failing: list[bool] = []
    monkeypatch.setattr("bncli.training.loop.training_step", third_fails)
    # Ctrl-C on a terminal ends the compiler too, so the failure comes before the next look at `stop`
    with pytest.raises(StoppedError if is_stopped else CompileError) as caught:
        train(load_config(tiny_config), tmp_path / "run", stop=lambda: is_stopped and bool(failing))
    assert len(str(caught.value)) < 400
    assert load_checkpoint(tmp_path / "run" / "last.pt").step == 2
    monkeypatch.undo()
    train(load_config(tiny_config), tmp_path / "run", resume=True)
    train(load_config(tiny_config), tmp_path / "whole")
    assert same_run(tmp_path / "whole", tmp_path / "run")


def test_another_error_of_a_step_stays_what_it_is(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("bncli.training.loop.training_step", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(load_config(tiny_config), tmp_path / "run")


def test_only_the_training_step_is_compiled(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation must give what `bncli eval` gives for the checkpoint, to the last bit."""
    compiled = []

    def record(model: torch.nn.Module, **options: object) -> torch.nn.Module:
        compiled.append((model, options))
        return torch.nn.Sequential(model)  # as good as compiled: another way into the same network

    monkeypatch.setattr(torch, "compile", record)
    plain = Run.start(prepare(load_config(tiny_config)))
    assert plain.forward is plain.model
    assert not compiled
    run = Run.start(prepare(load_config(tiny_config, [COMPILE])))
    _, (model, options) = compiled  # the first is something small, to see whether it can be done
    assert model is run.model is not run.forward
    assert options == {"dynamic": False}
    assert run.setup.runtime.describe_training()["compile"] is True
    assert list(run.model.state_dict()) == list(plain.model.state_dict())


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's compiler itself
def test_compiled_training_has_the_losses_and_statistics_of_training_that_is_not(tiny_config: Path) -> None:
    # without kinks, as in test_plain_loop.py; two sizes of images, parts of unequal size
    changes = ["model.activation=gelu", "model.pool=avg", "model.head_pool=avg", "train.micro_batch_size=30"]
    changes += ["augment.small_epochs=1", "train.learning_rate=0.05"]
    losses: list[list[float]] = []
    runs = []
    for more in ([], [COMPILE]):
        run = Run.start(prepare(load_config(tiny_config, [*changes, *more])))
        run.model.train()
        losses.append([])
        for _ in range(2):
            for images, labels in run.batches():
                losses[-1].append(training_step(run, images, labels)[0].item())
            run.epoch += 1
        runs.append(run)
    assert len(losses[0]) == 20
    assert losses[1] != losses[0]  # or nothing was compiled
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for (name, expected), found in zip(runs[0].model.named_buffers(), runs[1].model.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_run_resumes_to_the_same_bits_and_its_checkpoint_is_an_ordinary_one(
    tiny_config: Path, tmp_path: Path, bncli: Bncli
) -> None:
    config = load_config(tiny_config, [COMPILE])
    train(config, tmp_path / "whole")
    steps: list[int] = []

    def stop() -> bool:
        steps.append(1)
        return len(steps) > 3

    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", stop=stop)
    result = train(config, tmp_path / "run", resume=True)
    assert same_run(tmp_path / "whole", tmp_path / "run")
    evaluated = bncli("eval", result.checkpoint, "--json").json
    assert (evaluated["accuracy"], evaluated["loss"]) == (result.test_accuracy, result.test_loss)
