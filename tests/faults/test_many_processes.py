"""Several processes, one of which dies: nothing is lost, and the run goes on with the same bits."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bncli.checkpoints import load_checkpoint
from tests.distributed.torchrun import command, environment, torchrun
from tests.faults.conftest import FAULTY, metrics_of, same_run

pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "killed_worker.py"


@pytest.fixture(scope="module")
def parts_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAULTY with batches of 4 parts."""
    path = tmp_path_factory.mktemp("config") / "parts.yaml"
    path.write_text(FAULTY.replace("batch_size: 25,", "batch_size: 25, micro_batch_size: 7,"))
    return path


@pytest.fixture(scope="module")
def whole_run(parts_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two processes."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    done = torchrun(2, "-m", "bncli", "train", parts_config, "--run-dir", run_dir)
    assert done.code == 0, done.err
    assert done.err.count("Training on 90 images") == 1  # one speaks
    assert "2 processes of 1 thread)" in done.err
    assert done.out.count("test accuracy") == 1
    assert load_checkpoint(run_dir / "last.pt").runtime["processes"] == 2
    return run_dir


@pytest.mark.parametrize("kill", ["1:5", "0:12", "1:24", "0:17", "1:37", "0:40"])
def test_a_killed_process_ends_all_and_the_resumed_run_has_the_same_bits(
    parts_config: Path, whole_run: Path, tmp_path: Path, kill: str
) -> None:
    start = time.monotonic()
    done = torchrun(2, WORKER, "train", parts_config, "--run-dir", tmp_path / "run", KILL=kill)
    assert done.code == 1
    assert time.monotonic() - start < 60
    assert done.errors == [f"rank {kill[0]} of 2 is gone: killed, or out of reach"]
    assert -signal.SIGKILL in done.rank_codes.values()
    done = torchrun(2, "-m", "bncli", "train", "--resume", tmp_path / "run")
    assert done.code == 0, done.err
    assert same_run(whole_run, tmp_path / "run")


def test_rank_0_killed_while_the_others_wait_for_its_last_words(parts_config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ("train", parts_config, "--run-dir", run_dir, "--set", "train.recalibrate=precise")
    done = torchrun(2, WORKER, *words, KILL="0:recalibrated.pt")
    assert done.errors == ["rank 0 of 2 is gone: killed, or out of reach"]
    assert not (run_dir / "recalibrated.pt").exists()
    done = torchrun(2, "-m", "bncli", "train", "--resume", run_dir)
    assert done.code == 0, done.err
    assert load_checkpoint(run_dir / "recalibrated.pt").recalibration["method"] == "precise"


@pytest.mark.parametrize("kill", ["1:2", "1:24", "0:19"])
def test_an_elastic_restart_resumes_by_itself(
    parts_config: Path, whole_run: Path, tmp_path: Path, kill: str
) -> None:
    words = ("train", parts_config, "--run-dir", tmp_path / "run")
    done = torchrun(2, WORKER, *words, options=("--max-restarts=1",), KILL=kill)
    assert done.code == 0, done.err
    assert same_run(whole_run, tmp_path / "run")


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_another_number_of_processes_goes_on_to_rounding(
    parts_config: Path, whole_run: Path, tmp_path: Path, num_ranks: int
) -> None:
    torchrun(2, WORKER, "train", parts_config, "--run-dir", tmp_path / "run", KILL="0:17")
    done = torchrun(num_ranks, "-m", "bncli", "train", "--resume", tmp_path / "run")
    assert done.code == 0, done.err
    number = "1 process" if num_ranks == 1 else f"{num_ranks} processes"
    assert f"bncli: {number}, 2 before: sums round differently" in done.err
    whole, run = (load_checkpoint(folder / "last.pt") for folder in (whole_run, tmp_path / "run"))
    for key, value in whole.state_dict.items():
        torch.testing.assert_close(run.state_dict[key], value, rtol=1e-3, atol=1e-4)
    assert [line["epoch"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_launch_saves_its_last_step(
    parts_config: Path, whole_run: Path, tmp_path: Path, number: int
) -> None:
    run_dir = tmp_path / "run"
    words = ("-m", "bncli", "train", parts_config, "--run-dir", run_dir, "--set", "train.epochs=2000")
    with subprocess.Popen(
        command(2, *words),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not (run_dir / "best.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        # Ctrl-C on a terminal reaches every process; a scheduler ends the first
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=60)
    assert err.count("stopped after step") == 1
    step = int(err.split("stopped after step ")[1].split()[0])
    assert load_checkpoint(run_dir / "last.pt").step == step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("train.micro_batch_size=null",), "train.micro_batch_size: null leaves a process without data"),
        (
            ("train.micro_batch_size=13",),
            "train.micro_batch_size: 13 leaves a process without data: 3 processes",
        ),
        (("model.batch_norm.sync=true",), "model.batch_norm.sync: normalises the whole batch together"),
        (
            ("model.batch_norm.sync=true", "train.micro_batch_size=null", "train.batch_size=88"),
            "train.batch_size: a batch of 2 images leaves a process without data; start at most 2 processes",
        ),
    ],
)
def test_batches_that_do_not_fit_the_processes_are_refused(
    parts_config: Path, tmp_path: Path, changes: tuple[str, ...], message: str
) -> None:
    options = [word for change in changes for word in ("--set", change)]
    done = torchrun(3, "-m", "bncli", "train", parts_config, *options, "--run-dir", tmp_path / "run")
    (line,) = done.errors
    # the key once, without its section before it
    assert re.match(rf"(rank \d of 3: )?{re.escape(message)}", line)
    assert done.rank_codes and set(done.rank_codes.values()) <= {2, 130, -15, 143}
    assert not (tmp_path / "run").exists()


def test_a_buffer_that_each_process_follows_for_itself_is_refused(tmp_path: Path) -> None:
    network = Path(__file__).parent.parent / "distributed" / "own_network.py"
    options = (f"model.name={network}:counting", "train.batch_size=50", "train.micro_batch_size=25")
    words = [word for option in options for word in ("--set", option)]
    done = torchrun(2, "-m", "bncli", "train", *words, "--run-dir", tmp_path / "run")
    (line,) = done.errors
    assert "its buffer seen changes in training" in line


def test_restarts_need_a_run_directory(parts_config: Path) -> None:
    done = torchrun(2, "-m", "bncli", "train", parts_config, options=("--max-restarts=1",))
    assert any("with --max-restarts it needs --run-dir" in line for line in done.errors)


def test_another_configuration_in_one_rank_is_refused(parts_config: Path, tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        "from bncli.cli.app import main\n"
        "seed = ['--set', 'train.seed=1'] if os.environ['RANK'] == '1' else []\n"
        "sys.exit(main([*sys.argv[1:], *seed]))\n"
    )
    done = torchrun(2, script, "train", parts_config, "--run-dir", tmp_path / "run")
    (line,) = done.errors
    assert line.startswith("rank 1 differs from rank 0 in configuration.train.seed: 0 in rank 0, 1 in rank 1")
    assert not (tmp_path / "run").exists()


def test_a_number_that_is_not_finite_ends_all(parts_config: Path, tmp_path: Path) -> None:
    words = ("train", parts_config, "--run-dir", tmp_path / "run", "--set", "train.learning_rate=1e30")
    done = torchrun(2, "-m", "bncli", *words)
    (line,) = done.errors
    assert "not a finite number in step" in line
    assert (tmp_path / "run" / "last.pt").is_file()
