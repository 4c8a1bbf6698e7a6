import os
import pty
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from bncli.cli import progress
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


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let so many seconds go by, for what shows progress."""
    now = [100.0]

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return pass_by


def test_off_a_terminal_a_part_says_every_few_seconds_how_far_it_is_and_when_it_is_done(
    capfd: pytest.CaptureFixture[str], wait: Callable[[float], None]
) -> None:
    with ProgressReporter() as report:
        for done in range(0, 1401, 100):  # a second each
            report("counted", done, 1400)
            wait(1.0)
        for done in range(0, 400, 100):
            report("first\x1b[31m pass", done)
            wait(1.0)
        report("in one go", 7)
        wait(3.0)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "counted: 200 of 1,400",
        "counted: 1,200 of 1,400",
        "counted: 1,400",
        "first\\x1b[31m pass: 100",
        "first\\x1b[31m pass: 300",
        "in one go: 7",
    ]


def test_off_a_terminal_nothing_is_said_of_short_parts_nor_of_one_that_broke_off(
    capfd: pytest.CaptureFixture[str], wait: Callable[[float], None]
) -> None:
    with pytest.raises(KeyboardInterrupt), ProgressReporter() as report:
        for what in ("one", "two", "three"):
            for done in range(5):
                report(what, done, 4)
                wait(0.3)
        report.note("between two")
        report("broken off", 5, 10)
        wait(5.0)
        raise KeyboardInterrupt
    assert capfd.readouterr().err.splitlines() == ["bncli: between two"]


def test_on_a_terminal_a_bar_shows_how_far_it_is_and_is_gone_at_the_end() -> None:
    written = on_a_terminal(SCRIPT)
    for shown in ("counted", "25%", "75%", "second pass", "broken off", "50%", "bncli: between two"):
        assert shown in written
    assert "\x1b[31m" not in written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") > 0  # the cursor hidden, and back
    assert written.rstrip().endswith(("\x1b[2K", "\x1b[?25h"))


def test_a_part_without_a_total_is_done_when_another_begins(
    capfd: pytest.CaptureFixture[str], wait: Callable[[float], None]
) -> None:
    with ProgressReporter() as report:
        report("one", 3)
        wait(1.0)
        report("one", 5)
        wait(1.0)
        assert capfd.readouterr().err == ""
        report("two", 1)
        assert capfd.readouterr().err == "one: 5\n"
        wait(2.0)
    assert capfd.readouterr().err == "two: 1\n"
