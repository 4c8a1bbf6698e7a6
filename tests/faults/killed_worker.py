"""`bncli` in a process of a launch that kills itself at a moment it is told.

    KILL=RANK:NUMBER torchrun ... tests/faults/killed_worker.py train ...

Moments are: before and after each exchange with other processes, and each time that a file is put on the
disk. With KILL=RANK:NAME it dies when the file of that name is about to be put in its place. After a restart
by torchrun nothing is killed any more.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bncli.cli.app import main
from bncli.distributed.processes import Processes

_moments = 0


def moment() -> None:
    """Count one, and die if it is the one."""
    global _moments  # noqa: PLW0603
    rank, when = os.environ["KILL"].split(":")
    _moments += os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if str(_moments) == when:
        os.kill(os.getpid(), signal.SIGKILL)


def watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a moment before and after it."""

    def call(*arguments: Any, **options: Any) -> Any:
        moment()
        result = function(*arguments, **options)
        moment()
        return result

    return call


def replace(path: Path, target: Path) -> Path:
    """`Path.replace` that may not come to its end."""
    if os.environ["KILL"] == f"{os.environ['RANK']}:{target.name}":
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace(path, target)  # noqa: PTH105  # which this stands for
    return target


if __name__ == "__main__":
    if "KILL" in os.environ:
        Processes.gather = watched(Processes.gather)  # type: ignore[method-assign]
        os.fsync = watched(os.fsync)
        Path.replace = replace  # type: ignore[method-assign,assignment]
    sys.exit(main(None))
