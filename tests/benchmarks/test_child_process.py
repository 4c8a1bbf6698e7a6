import os
import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks.child_process import run_child


def test_a_child_is_measured_and_its_words_are_kept() -> None:
    code = (
        "import sys; block = bytearray(200 * 2**20); print('out'); print('err', file=sys.stderr); sys.exit(3)"
    )
    done = run_child([sys.executable, "-c", code])
    assert (done.code, done.output, done.message) == (3, "out\n", "err")
    assert 0 < done.seconds < 30
    assert done.peak_mib > 200


def test_the_watcher_is_asked_while_the_child_runs_and_after_its_end(tmp_path: Path) -> None:
    code = f"import time; time.sleep(0.3); open({str(tmp_path / 'last words')!r}, 'w')"
    seen: list[tuple[float, bool]] = []
    done = run_child(
        [sys.executable, "-c", code],
        watch=lambda seconds: seen.append((seconds, (tmp_path / "last words").exists())),
    )
    assert len(seen) > 5
    assert seen[-1] == (done.seconds, True)
    assert seen[0][1] is False


def test_no_child_outlives_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    code = f"import os, time; open({str(path)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def interrupt(_seconds: float) -> None:
        if path.exists() and path.read_text():
            raise KeyboardInterrupt

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", code], watch=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)
    assert time.perf_counter() - start < 30
