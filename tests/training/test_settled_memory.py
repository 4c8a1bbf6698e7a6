"""When a run keeps freed memory, and when it gives it back."""

from pathlib import Path

import pytest

from bncli.config_file import load_config
from bncli.training import run as run_module
from bncli.training.run import Run
from bncli.training.setup import prepare


@pytest.mark.parametrize("reuse", [True, False])
def test_freed_memory_is_kept_from_the_first_step_on_and_given_back_now_and_then(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, reuse: bool
) -> None:
    done: list[str] = []
    for name in ("map_large_blocks", "keep_freed_memory", "release_freed_memory"):
        monkeypatch.setattr(run_module, name, lambda name=name: done.append(name))
    now = [100.0]
    run = Run.start(prepare(load_config(tiny_config, [f"runtime.reuse_memory={str(reuse).lower()}"])))
    assert done == ["map_large_blocks"] * reuse
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: now[0])
    for seconds, expected in (
        (0.0, ["keep_freed_memory", "release_freed_memory"]),
        (5.0, []),
        (6.0, ["release_freed_memory"]),
        (9.0, []),
    ):
        done.clear()
        now[0] += seconds
        run.settle_memory()
        assert done == expected * reuse
