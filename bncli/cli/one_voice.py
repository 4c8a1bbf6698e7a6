"""`bncli` as one of several processes: only rank 0 speaks, and an end is explained once.

All processes get the same words and mostly make the same mistakes. The first that fails says why; torchrun
then ends the others. A process that is killed cannot say so: those that are left say it.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

import typer

from bncli.cli.messages import one_line
from bncli.distributed.last_words import LastWords
from bncli.distributed.launch import Launch
from bncli.errors import BncliError, PeerLostError, ProcessesError

COMMANDS = ("train", "eval", "recalibrate")  # that share their work among processes
_current: LastWords | None = None


def last_words() -> LastWords | None:
    """Of this process, while it is one of several."""
    return _current


class OneVoice:
    """What a process of a launch does in place of an ordinary one, from its first line to its end."""

    def __init__(self, launch: Launch, name: str) -> None:
        global _current  # noqa: PLW0603  # one process is in one launch
        self._words = _current = LastWords(launch)
        self._name = name
        self._stderr = sys.stderr
        signal.signal(signal.SIGTERM, _interrupt)  # with which torchrun ends those that are left
        if not launch.is_main:
            sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  # to the end

    def check(self, arguments: list[str]) -> None:
        """Refuse commands that would do the same in every process.

        Raises:
            ProcessesError: naming those that share their work.
        """
        command = next((word for word in arguments if not word.startswith("-")), None)
        known = command is not None and not {"-h", "--help"} & set(arguments)
        if known and command not in COMMANDS:
            raise ProcessesError(
                f"{self._name} {command} works in one process: start it without torchrun; under torchrun work"
                f" {', '.join(COMMANDS[:-1])} and {COMMANDS[-1]}"
            )

    def fail(self, error: str | BaseException, code: int) -> NoReturn:
        """End this process; say why, if nobody has."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # torchrun's, which may come because of the same end
        message: str | None = None
        if isinstance(error, PeerLostError):
            message = self._words.explain(str(error))
        elif isinstance(error, KeyboardInterrupt | typer.Abort):
            # before torch is there, nothing is under way, and torchrun says itself that it ends
            message = self._interruption() if "torch" in sys.modules else None
        else:
            named = isinstance(error, BncliError) and not isinstance(error, ProcessesError)
            message = f"{self._words.named(self._words.launch.rank)}: {error}" if named else str(error)
        if message is not None and self._words.take():
            print(f"{self._name}: error: {one_line(message)}", file=self._stderr, flush=True)
        self.end(code)

    def _interruption(self) -> str | None:
        missing = self._words.explain("")
        return "interrupted" if missing is not None and missing.endswith(": ") else missing

    def end(self, code: int) -> NoReturn:
        """End at once: threads and connections of PyTorch could wait for processes that are gone."""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            self._stderr.flush()
        os._exit(code)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
