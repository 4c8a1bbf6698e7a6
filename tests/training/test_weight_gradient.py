"""Which layers compute patches: nothing without AMX, what was measured with it, and the same when resumed."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bncli.checkpoints import load_checkpoint, save_checkpoint
from bncli.config_file import load_config
from bncli.errors import CheckpointError, StoppedError
from bncli.training import weight_gradient
from bncli.training.loop import train
from bncli.training.patch_convolution import PatchConv2d
from bncli.training.run import Run
from bncli.training.setup import prepare
from bncli.training.weight_gradient import layers_by_patches
from tests.conftest import Bncli

BOTH = ("stages.0.0.conv", "stages.1.0.conv")
BFLOAT16 = "runtime.precision=bfloat16"


def never(*_: Any) -> Any:
    raise AssertionError("measured")


@pytest.fixture
def with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AMX on which patches are faster in the second layer only."""
    monkeypatch.setattr(weight_gradient, "has_amx", lambda: True)
    # the first layer has three channels
    monkeypatch.setattr(
        weight_gradient, "_time_both", lambda call, _: (1.0, 2.0 if call.weight_shape[1] == 3 else 0.5)
    )


@pytest.mark.parametrize(
    ("amx", "overrides"),
    [
        (False, [BFLOAT16]),
        (True, ["runtime.precision=float32"]),
        (True, [BFLOAT16, "runtime.weight_gradient=torch"]),
    ],
)
def test_nothing_changes_and_nothing_is_measured(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, amx: bool, overrides: list[str]
) -> None:
    monkeypatch.setattr(weight_gradient, "has_amx", lambda: amx)
    monkeypatch.setattr(weight_gradient, "measured_layers", never)
    run = Run.start(prepare(load_config(tiny_config, overrides)))
    assert run.by_patches == ()
    assert not any(isinstance(layer, PatchConv2d) for layer in run.model.modules())
    assert run.describe_runtime() == run.setup.runtime.describe_training()


def test_all_layers_compute_patches_where_configured(tiny_config: Path) -> None:
    setup = prepare(load_config(tiny_config, ["runtime.weight_gradient=patches", "model.whitening=true"]))
    run = Run.start(setup)
    assert run.by_patches == BOTH  # whitening is not trained
    assert [name for name, each in run.model.named_modules() if isinstance(each, PatchConv2d)] == [*BOTH]


def test_a_measurement_leaves_the_network_and_the_random_numbers_alone(tiny_config: Path) -> None:
    setup = prepare(load_config(tiny_config, [BFLOAT16]))
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert set(weight_gradient.measured_layers(setup)) <= {*BOTH}
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in setup.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.usefixtures("with_amx")
def test_a_resumed_run_keeps_what_was_measured_and_ends_with_the_same_bits(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config, [BFLOAT16])
    whole = load_checkpoint(train(config, tmp_path / "whole").checkpoint)
    assert whole.runtime["weight_gradient_by_patches"] == [BOTH[1]]
    calls = iter(range(100))
    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", stop=lambda: next(calls) == 6)
    # on the machine where it goes on there is no AMX
    monkeypatch.setattr(weight_gradient, "has_amx", lambda: False)
    monkeypatch.setattr(weight_gradient, "measured_layers", never)
    resumed = load_checkpoint(train(config, tmp_path / "run", resume=True).checkpoint)
    assert resumed.runtime["weight_gradient_by_patches"] == [BOTH[1]]
    assert all(torch.equal(value, whole.state_dict[key]) for key, value in resumed.state_dict.items())
    # the other choice would not have: else this test could not fail
    other = load_checkpoint(train(config, tmp_path / "other").checkpoint)
    assert not all(torch.equal(value, whole.state_dict[key]) for key, value in other.state_dict.items())


@pytest.mark.usefixtures("with_amx")
def test_a_run_that_began_without_patches_goes_on_without(tiny_config: Path) -> None:
    setup = prepare(load_config(tiny_config, [BFLOAT16]))
    assert layers_by_patches(setup, None) == (BOTH[1],)
    assert layers_by_patches(setup, ()) == ()


def test_what_a_resumed_run_computes_otherwise_is_known(finished_run: Path, tiny_config: Path) -> None:
    last = load_checkpoint(finished_run / "last.pt")
    patched = replace(last, runtime={**last.runtime, "weight_gradient_by_patches": [*BOTH]})
    torchs, patches = "runtime.weight_gradient=torch", "runtime.weight_gradient=patches"
    gradient = "weight gradient by patches in {} layers, in {} before"
    for former, overrides, expected in (
        (last, [], ()),
        (patched, [], ()),  # kept
        (last, [patches], (gradient.format(2, 0),)),
        (patched, [torchs, BFLOAT16], ("precision bfloat16, float32 before", gradient.format(0, 2))),
    ):
        assert Run.restore(prepare(load_config(tiny_config, overrides)), former).changes == expected


@pytest.mark.slow
def test_a_resumed_run_says_what_it_computes_otherwise(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    changes = ("--set", "train.epochs=3", "--set", "runtime.weight_gradient=patches")
    outcome = bncli("train", "--resume", tmp_path / "run", *changes)
    assert outcome.code == 0
    assert (
        "bncli: weight gradient by patches in 2 layers, in 0 before: numbers round differently, so the run"
        " ends elsewhere than without the break, as if with another seed\n"
    ) in outcome.err


@pytest.mark.parametrize("recorded", [["head"], ["stages.9.0.conv"], [7], 7, {"a": 1}, "conv"])
def test_what_a_checkpoint_records_must_fit(
    finished_run: Path, tiny_config: Path, tmp_path: Path, recorded: object
) -> None:
    last = load_checkpoint(finished_run / "last.pt")
    forged = replace(last, runtime={**last.runtime, "weight_gradient_by_patches": recorded})
    save_checkpoint(forged, tmp_path / "forged.pt")
    with pytest.raises(CheckpointError, match="cannot resume: the checkpoint does not fit"):
        Run.restore(prepare(load_config(tiny_config)), load_checkpoint(tmp_path / "forged.pt"))
