"""A process that has imported bncli and forks one training process per request: real ones, in milliseconds.

Each line on stdin is a JSON request; the answers are the child's PID and, when it has ended, its wait status.
With `die_at` the child kills itself with SIGKILL at that moment of its writing: see `moment`.
"""

import json
import os
import signal
import stat
import sys
import tempfile
from pathlib import Path

import torch

from bncli.config_file import load_config
from bncli.hardware import describe_machine
from bncli.training import StepDone, prepare, train
from bncli.training.run import Run

torch.set_num_threads(1)  # no thread exists yet, so that forking is safe


def count_moments(die_at: int) -> list[int]:
    """Let every moment around a file operation count, and the one numbered `die_at`, from 1, be the last."""
    passed = [0]

    def moment(torn: int | None = None) -> None:
        passed[0] += 1
        if passed[0] == die_at:
            if torn is not None:  # a part of what was written is on the disk
                os.ftruncate(torn, max(0, os.fstat(torn).st_size - 5))
            os.kill(os.getpid(), signal.SIGKILL)

    fsync, replace, mkstemp, mkdir = os.fsync, Path.replace, tempfile.mkstemp, Path.mkdir

    def counting_fsync(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            moment(torn=handle)
        moment()
        fsync(handle)
        moment()

    def counting_replace(path: Path, target: Path) -> Path:
        moment()
        result = replace(path, target)
        moment()
        return result

    def counting_mkstemp(**options: object) -> tuple[int, str]:
        result = mkstemp(**options)
        moment()
        return result

    def counting_mkdir(path: Path, **options: object) -> None:
        moment()
        mkdir(path, **options)
        moment()

    os.fsync, tempfile.mkstemp = counting_fsync, counting_mkstemp
    Path.replace, Path.mkdir = counting_replace, counting_mkdir
    return passed


def run_child(request: dict) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    passed = count_moments(request["die_at"])

    def report(event: object) -> None:
        if isinstance(event, StepDone):
            os.write(log, f"{event.step}\n".encode())

    os.write(log, b"start\n")
    run_dir = Path(request["run_dir"])
    resume = (run_dir / "config.yaml").exists()
    train(load_config(request["config"], request["overrides"]), run_dir, resume=resume, report=report)
    os.write(log, f"moments {passed[0]}\n".encode())


def main() -> None:
    # what is imported late is imported once, here
    Run.start(
        prepare(
            load_config(
                None, ["data.name=synthetic", "data.num_train=10", "data.num_test=10", "train.batch_size=5"]
            )
        )
    )
    describe_machine()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                run_child(json.loads(line))
                status = 0
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(status)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
