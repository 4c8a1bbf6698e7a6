"""Two runs in one directory, and resuming what is not the same run."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bncli.checkpoints import load_checkpoint
from bncli.config_file import load_config
from bncli.data import Split
from bncli.errors import CheckpointError, RunError, StoppedError
from bncli.training import Started, train
from bncli.training.run_dir import LOCK_NAME, locked
from bncli.training.setup import Setup, prepare
from tests.conftest import Bncli, save_as_if_whole
from tests.faults.conftest import FAULTY, content_of, metrics_of, resume_forged, same_run


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_one_directory_is_refused_with_the_process_of_the_first(
    faulty_config: Path, tmp_path: Path, resume: bool
) -> None:
    config = load_config(faulty_config)
    refused = []

    def start_another(event: object) -> None:
        if isinstance(event, Started):
            with pytest.raises(RunError, match=rf"another run is writing here \(process {os.getpid()} on "):
                train(config, tmp_path / "run", resume=resume)
            refused.append(True)

    train(config, tmp_path / "run", report=start_another)
    assert refused == [True]
    with locked(tmp_path / "run"):  # the first has ended: the file is there, the lock is not
        pass


def test_two_resumed_runs_in_one_directory_are_refused(bncli: Bncli, whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    with locked(tmp_path / "run"):
        outcome = bncli("train", "--resume", tmp_path / "run")
    assert outcome.code == 2
    assert f"process {os.getpid()} on" in outcome.err


@pytest.mark.parametrize("which", ["images", "labels"])
def test_other_data_of_the_same_pixel_mean_are_refused(
    faulty_config: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")

    def prepare_swapped(*arguments: object, **options: object) -> Setup:
        setup = prepare(*arguments, **options)
        images, labels = setup.dataset.train.images, setup.dataset.train.labels
        other = int((labels != labels[0]).nonzero()[0])
        order = torch.arange(len(labels))
        order[0], order[other] = other, 0
        split = Split(images[order], labels) if which == "images" else Split(images, labels[order])
        return replace(setup, dataset=replace(setup.dataset, train=split))

    monkeypatch.setattr("bncli.training.open_run.prepare", prepare_swapped)
    with pytest.raises(
        RunError, match=r"the images or labels are not those .*was [0-9a-f]{64}, now [0-9a-f]"
    ):
        train(load_config(faulty_config), tmp_path / "run", resume=True)


def test_another_configuration_is_refused_before_the_first_checkpoint_too(
    faulty_config: Path, whole_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(whole_run / "config.yaml", tmp_path / "run")
    with pytest.raises(RunError, match=r"train\.seed was 0, now 1"):
        train(load_config(faulty_config, ["train.seed=1"]), tmp_path / "run", resume=True)
    train(load_config(faulty_config), tmp_path / "run", resume=True)
    assert same_run(whole_run, tmp_path / "run")


def test_an_extended_run_remembers_how_far_it_was_to_go(
    bncli: Bncli, faulty_config: Path, whole_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    calls = iter(range(1, 100))
    with pytest.raises(StoppedError):
        longer = load_config(faulty_config, ["train.epochs=7"])
        train(longer, tmp_path / "run", resume=True, stop=lambda: next(calls) == 2)
    assert bncli("train", "--resume", tmp_path / "run").code == 0
    assert [line["epoch"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]


def test_fewer_epochs_than_were_begun_are_refused(
    faulty_config: Path, whole_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    with pytest.raises(RunError, match=r"train\.epochs=4: it has finished 5 already"):
        train(load_config(faulty_config, ["train.epochs=4"]), tmp_path / "run", resume=True)
    calls = iter(range(1, 100))
    with pytest.raises(StoppedError):
        longer = load_config(faulty_config, ["train.epochs=7"])
        train(longer, tmp_path / "run", resume=True, stop=lambda: next(calls) == 2)
    with pytest.raises(RunError, match=r"train\.epochs=5: it is in epoch 6 already"):
        train(load_config(faulty_config), tmp_path / "run", resume=True)


def test_a_damaged_checkpoint_is_never_resumed(faulty_config: Path, whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    content["state_dict"]["head.bias"][0] += 1
    torch.save(content, tmp_path / "run" / "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt: damaged.*head\.bias"):
        train(load_config(faulty_config), tmp_path / "run", resume=True)


class Code:
    """Pickled, it asks for a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_code_is_never_resumed(bncli: Bncli, whole_run: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    torch.save(content | {"optimizer": Code(tmp_path / "owned")}, tmp_path / "run" / "last.pt")
    outcome = bncli("train", "--resume", tmp_path / "run")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "does not execute" in outcome.err
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(optimizer=None),
        lambda c: c.update(optimizer={}),
        lambda c: c["optimizer"].update(state=[]),
        lambda c: c["optimizer"]["state"].pop(0),
        lambda c: c["optimizer"]["state"].update({"0": c["optimizer"]["state"].pop(0)}),
        lambda c: c["optimizer"]["state"].update({99: {}}),
        lambda c: c["optimizer"]["state"].update({0: None}),
        lambda c: c["optimizer"]["state"].update({0: {}}),
        lambda c: c["optimizer"]["state"][0].update(momentum_buffer="x"),
        lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(1)),
        lambda c: c["optimizer"]["state"][0].update(
            momentum_buffer=c["optimizer"]["state"][0]["momentum_buffer"].double()
        ),
        lambda c: c["optimizer"]["state"][0].update(more=1),
        lambda c: c.update(step=c["step"] + 1),
        lambda c: c.update(epoch=c["epoch"] - 1),
        lambda c: c.update(running_epoch=[]),
        lambda c: c.update(running_epoch={"statistics": {"layers": 1}}),
        lambda c: c.update(running_epoch={"statistics": {"layers": {}}}),
    ],
)
def test_a_forged_checkpoint_is_refused_in_one_line(
    bncli: Bncli, whole_run: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    outcome = resume_forged(bncli, tmp_path / "run", change)
    (line,) = (line for line in outcome.err.splitlines() if not line.startswith("draw images"))
    assert outcome.code == 2, outcome.err
    assert f"{tmp_path / 'run' / 'last.pt'}: cannot resume: the checkpoint does not fit" in line


def test_how_a_resumed_run_is_optimised_is_told_by_its_configuration_alone(
    bncli: Bncli, whole_run: Path, tmp_path: Path
) -> None:
    for name in ("honest", "forged"):
        shutil.copytree(whole_run, tmp_path / name)
    content = torch.load(tmp_path / "forged" / "last.pt", weights_only=True)
    content["optimizer"]["param_groups"][0] |= {"maximize": True, "weight_decay": "x", "lr": None}
    save_as_if_whole(content, tmp_path / "forged" / "last.pt")
    for name in ("honest", "forged"):
        assert bncli("train", "--resume", tmp_path / name, "--set", "train.epochs=6").code == 0
    assert same_run(tmp_path / "honest", tmp_path / "forged")


def test_a_run_killed_before_it_had_a_configuration_can_be_started_again(
    bncli: Bncli, faulty_config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".lock").touch()
    (run_dir / ".config.yaml.abcd_123.tmp").write_text("model: {wid")
    outcome = bncli("train", "--resume", run_dir)
    assert outcome.code == 2
    assert f"start it with `bncli train CONFIG --run-dir {run_dir}`" in outcome.err
    assert bncli("train", faulty_config, "--run-dir", run_dir).code == 0
    assert not list(run_dir.glob(".*.tmp"))


def test_only_leftovers_of_our_own_are_cleared_away(
    faulty_config: Path, whole_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    (run_dir / ".last.pt.abcd_123.tmp").write_bytes(b"half")
    foreign = {".last.pt.tmp", ".notes.abcd_123.tmp", "last.pt.abcd_123.tmp", ".last.pt.abcd_123.tmp2"}
    for name in foreign:
        (run_dir / name).touch()
    train(load_config(faulty_config), run_dir, resume=True)
    assert {path.name for path in run_dir.iterdir()} - {path.name for path in whole_run.iterdir()} == foreign


def test_a_checkpoint_in_the_midst_of_an_epoch_can_be_evaluated(
    bncli: Bncli, faulty_config: Path, tmp_path: Path
) -> None:
    calls = iter(range(1, 100))
    with pytest.raises(StoppedError):
        train(load_config(faulty_config), tmp_path / "run", stop=lambda: next(calls) == 2)
    outcome = bncli("eval", tmp_path / "run" / "last.pt", "--num-images", "8", "--json")
    assert outcome.code in {0, 1}
    assert outcome.json["num_images"] == 20


def test_checkpoints_are_written_every_so_many_epochs(faulty_config: Path, tmp_path: Path) -> None:
    config = load_config(faulty_config, ["train.checkpoint_every=2", "train.checkpoint_unit=epochs"])
    saved = []

    def report(_event: object) -> None:
        path = tmp_path / "run" / "last.pt"
        saved.append(load_checkpoint(path).step if path.exists() else 0)

    train(config, tmp_path / "run", report=report)
    assert sorted(set(saved)) == [0, 8, 16, 20]  # 4 steps in an epoch; the last one always


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_runs_with_one_seed_have_the_same_bits(tmp_path: Path, threads: int, precision: str) -> None:
    (tmp_path / "config.yaml").write_text(FAULTY)
    overrides = [f"runtime.threads={threads}", f"runtime.precision={precision}", "model.widths=[16, 32]"]
    config = load_config(tmp_path / "config.yaml", overrides)
    for name in ("first", "second"):
        train(config, tmp_path / name)
    assert same_run(tmp_path / "first", tmp_path / "second")
    other = load_config(tmp_path / "config.yaml", [*overrides, "train.seed=1"])
    train(other, tmp_path / "other")
    assert content_of(tmp_path / "first" / "last.pt") != content_of(tmp_path / "other" / "last.pt")


def test_everybody_who_may_write_into_the_directory_may_take_the_lock(tmp_path: Path) -> None:
    former = os.umask(0o002)
    try:
        with locked(tmp_path):
            assert (tmp_path / LOCK_NAME).stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(former)
