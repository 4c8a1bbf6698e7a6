"""Other launches than torchrun on one machine: by hand, as plain srun does, and on two nodes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bncli.checkpoints import load_checkpoint
from bncli.cli.explain.topics import find_topic
from tests.distributed.torchrun import ROOT, environment, torchrun
from tests.faults.conftest import FAULTY

pytestmark = pytest.mark.slow
FOREVER = ("--set", "train.epochs=100000")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "parts.yaml"
    path.write_text(FAULTY.replace("batch_size: 25,", "batch_size: 25, micro_batch_size: 7,"))
    return path


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class Programs:
    """Some programs at once, of which none outlives the test."""

    def __init__(self, *commands: tuple[list[str], dict[str, str]]) -> None:
        self.running = [
            subprocess.Popen(
                words, cwd=ROOT, env=environment(**changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, start_new_session=True,
            )
            for words, changes in commands
        ]  # fmt: skip

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, *_: object) -> None:
        for program in self.running:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
            program.communicate()

    def ended(self) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of each."""
        texts = [program.communicate(timeout=120) for program in self.running]
        return [(program.returncode, *text) for program, text in zip(self.running, texts, strict=True)]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def by_hand(*words: object) -> Programs:
    """Two processes with the variables that PyTorch's documentation names, and no torchrun."""
    port = str(free_port())
    command = [sys.executable, "-m", "bncli", *map(str, words)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return Programs(*((command, shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")))


def test_processes_that_are_started_by_hand_train_as_those_of_torchrun(config: Path, tmp_path: Path) -> None:
    with by_hand("train", config, "--run-dir", tmp_path / "hand") as programs:
        (first, second) = programs.ended()
    assert first[0] == 0, first[2]
    assert "2 processes of 1 thread" in first[2]
    assert second == (0, "", "")
    done = torchrun(2, "-m", "bncli", "train", config, "--run-dir", tmp_path / "torchrun")
    assert done.code == 0, done.err
    hand, other = (load_checkpoint(tmp_path / name / "last.pt").state_dict for name in ("hand", "torchrun"))
    assert all(torch.equal(value, other[name]) for name, value in hand.items())


@pytest.mark.parametrize("victim", [0, 1])
def test_without_torchrun_too_the_one_that_is_left_says_who_died(
    config: Path, tmp_path: Path, victim: int
) -> None:
    """Rank 0 keeps the store through which they tell each other that they live."""
    with by_hand("train", config, "--run-dir", tmp_path / "run", *FOREVER) as programs:
        wait_for(tmp_path / "run" / "best.pt")
        programs.running[victim].kill()
        killed = time.monotonic()
        ended = programs.ended()
    assert time.monotonic() - killed < 30
    code, _, err = ended[1 - victim]
    assert code == 2
    assert err.count(f"bncli: error: rank {victim} of 2 is gone: killed, or out of reach") == 1


def test_a_process_that_stands_still_ends_all_after_the_timeout_that_the_user_sets(
    config: Path, tmp_path: Path
) -> None:
    options = (*FOREVER, "--set", "runtime.timeout=4")
    with by_hand("train", config, "--run-dir", tmp_path / "run", *options) as programs:
        wait_for(tmp_path / "run" / "best.pt")
        first, second = programs.running
        second.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        _, err = first.communicate(timeout=60)
        assert 3 < time.monotonic() - stopped < 30
    assert first.returncode == 2
    assert err.count("bncli: error: rank 1 of 2 is gone: killed, or out of reach") == 1


def two_nodes(*words: object) -> Programs:
    """The command that `bncli explain many-processes` gives for Slurm, as srun would start it twice."""
    (block,) = find_topic("many-processes").code("text")
    recipe = block.replace("\\\n", " ").split("srun torchrun")[1].split("-m bncli")[0]
    recipe = recipe.replace("$SLURM_NNODES", "2").replace("$HEAD:29500", f"127.0.0.1:{free_port()}")
    recipe = recipe.replace("--nproc-per-node 8", "--nproc-per-node 1")
    assert "$" not in recipe
    torchrun = [sys.executable, "-m", "torch.distributed.run", *recipe.split()]
    command = [*torchrun, "-m", "bncli", *map(str, words)]
    return Programs((command, {}), (command, {}))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in /proc")
def test_on_several_nodes_the_line_that_names_a_dead_rank_names_its_node(
    config: Path, tmp_path: Path
) -> None:
    with two_nodes("train", config, "--run-dir", tmp_path / "run", *FOREVER) as programs:
        wait_for(tmp_path / "run" / "best.pt")
        for program in programs.running:
            children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
            (rank,) = [child for child in children if is_rank_1(int(child))] or [None]
            if rank is not None:
                os.kill(int(rank), signal.SIGKILL)
        ended = programs.ended()
    errors = [line for _, _, err in ended for line in err.splitlines() if line.startswith("bncli: error")]
    (error,) = errors
    assert (
        error
        == f"bncli: error: rank 1 of 2 on {socket.gethostname()} (node 1) is gone: killed, or out of reach"
    )


def is_rank_1(pid: int) -> bool:
    return b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
