import os
import pty
import subprocess
import sys
from collections.abc import Callable

import pytest

from bncli.cli.progress import ProgressReporter

SCRIPT = """
import sys
from bncli.cli import progress
progress.PAUSE = 0.0
try:
    with progress.ProgressReporter() as report:
        for done in range(0, 1001, 250):
            report("counted", done, 1000)
        for done in range(0, 1001, 250):
            report("first\\x1b[31m pass", done)
        report("second pass", 7)
        report.note("between two")
        report("broken off", 5, 10)
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
"""


def on_a_terminal(script: str) -> str:
    """What a program writes on stderr when that is a terminal."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}
    with subprocess.Popen([sys.executable, "-c", script], stderr=follower, env=environment) as process:
        os.close(follower)
        written = b""
        try:
            while part := os.read(leader, 65536):
                written += part
        except OSError:  # the terminal's other end was closed
            pass
        assert process.wait() == 0
    os.close(leader)
    return written.decode()


def test_off_a_terminal_a_part_is_one_line_when_it_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    exec(SCRIPT, {})
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "counted: 1,000",
        "first\\x1b[31m pass: 1,000",
        "second pass: 7",
        "bncli: between two",
    ]


def test_on_a_terminal_a_bar_shows_how_far_it_is_and_is_gone_at_the_end() -> None:
    written = on_a_terminal(SCRIPT)
    for shown in ("counted", "25%", "75%", "second pass", "broken off", "50%", "bncli: between two"):
        assert shown in written
    assert "\x1b[31m" not in written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") > 0  # the cursor hidden, and back
    assert written.rstrip().endswith(("\x1b[2K", "\x1b[?25h"))


def test_a_part_without_a_total_is_done_when_another_begins(capfd: pytest.CaptureFixture[str]) -> None:
    def err(call: Callable[[], object]) -> str:
        call()
        return capfd.readouterr().err

    with ProgressReporter() as report:
        assert err(lambda: report("one", 3)) == ""
        assert err(lambda: report("one", 5)) == ""
        assert err(lambda: report("two", 1)) == "one: 5\n"
    assert capfd.readouterr().err == "two: 1\n"
