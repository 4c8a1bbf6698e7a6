"""A program in a process of its own: how long it took, its peak of memory, and what it printed."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BNCLI = (sys.executable, "-m", "bncli")
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    code: int  # its exit code; negative: the signal that ended it
    seconds: float  # from before its start to its end
    peak_mib: float  # of resident memory; Linux counts what the parent had when it started it
    output: str  # on stdout
    message: str  # on stderr, without white space around it


def run_child(
    command: Sequence[str], *, watch: Callable[[float], None] | None = None, **variables: str
) -> Finished:
    """Run a command to its end; it does not outlive an exception or Ctrl-C here.

    `watch` is given the seconds since the start, every POLL_SECONDS and once more after the end. `variables`
    are those of the environment that are others there.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=os.environ | variables)
        try:
            while process.returncode is None:
                # wait4 tells the peak of this child alone, where RUSAGE_CHILDREN has that of all so far
                pid, status, usage = os.wait4(process.pid, os.WNOHANG if watch else 0)
                seconds = time.perf_counter() - start
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                if watch is not None:
                    watch(seconds)
                if not pid:
                    time.sleep(POLL_SECONDS)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        peak_mib = usage.ru_maxrss * unit / 2**20
        for file in (output, errors):
            file.seek(0)
        printed, message = output.read().decode(), errors.read().decode(errors="replace").strip()
        return Finished(process.returncode, seconds, peak_mib, printed, message)
