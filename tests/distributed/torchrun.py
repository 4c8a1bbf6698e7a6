"""Start several processes as a user does."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Launched:
    """What all processes of a launch and torchrun did."""

    code: int  # of torchrun itself, which knows 0 and 1
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines in which bncli says why it ends."""
        return re.findall(r"^bncli: error: (.*)$", self.err, flags=re.MULTILINE)

    @property
    def rank_codes(self) -> dict[int, int]:
        """By rank, the exit codes that torchrun reports of ranks that failed."""
        pairs = re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", self.err)
        return {int(rank): int(code) for rank, code in pairs}


def command(num_ranks: int, *words: object, options: tuple[str, ...] = ()) -> list[str]:
    """The command line; a free port is found by torchrun."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_ranks}",
    ]
    return [*torchrun, *options, *map(str, words)]


def environment(**changes: str) -> dict[str, str]:
    """One thread a process, and this checkout's code."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "WORLD_"))}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | changes


def torchrun(
    num_ranks: int, *words: object, options: tuple[str, ...] = (), timeout: float = 120, **changes: str
) -> Launched:
    """Run to the end; a launch that hangs fails the test."""
    done = subprocess.run(
        command(num_ranks, *words, options=options),
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**changes),
        cwd=ROOT,
    )
    return Launched(done.returncode, done.stdout, done.stderr)
