"""When a run begins to keep freed memory."""

from pathlib import Path

import pytest

from bncli.config_file import load_config
from bncli.training import run as run_module
from bncli.training.loop import training_step
from bncli.training.run import Run
from bncli.training.setup import prepare


@pytest.mark.parametrize("reuse", [True, False])
def test_freed_memory_is_kept_from_the_first_step_on_and_no_earlier(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, reuse: bool
) -> None:
    done: list[str] = []
    for name in ("map_large_blocks", "keep_freed_memory", "release_freed_memory"):
        monkeypatch.setattr(run_module, name, lambda name=name: done.append(name))
    run = Run.start(prepare(load_config(tiny_config, [f"runtime.reuse_memory={str(reuse).lower()}"])))
    assert done == ["map_large_blocks"] * reuse
    run.model.train()
    images, labels = next(run.batches())
    for expected in (["keep_freed_memory", "release_freed_memory"], []):
        done.clear()
        training_step(run, images, labels)
        assert done == expected * reuse
