"""bncli's command line, of whichever version is at hand: some commands have moved."""

import contextlib
import functools
import io
import re
from dataclasses import dataclass

from bncli.__main__ import main


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Outcome:
    """Run one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue().strip())


def run(*arguments: object) -> None:
    """The same for a command that has to succeed."""
    outcome = call(*arguments)
    if outcome.code != 0:
        raise RuntimeError(f"bncli {arguments[0]} exits with {outcome.code}: {outcome.err}")


@functools.cache
def _has_command(name: str) -> bool:
    return re.search(rf"^\W*{name}\b", call("--help").out, re.MULTILINE) is not None


def comparing() -> str:
    """The command that takes two checkpoints."""
    return "compare" if _has_command("compare") else "inspect-stats"


def ruining() -> tuple[str, ...]:
    """The command that ruins a trained network in four ways."""
    return ("demo",) if _has_command("demo") else ("bench", "repair")
