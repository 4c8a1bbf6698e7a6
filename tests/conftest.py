"""What several test files share: a command line to call, and one small finished run."""

import gc
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bncli.checkpoints.part_digests import digest_parts
from bncli.cli.app import main

# Networks this small gain nothing from a second thread, and beside another busy process two threads
# that wait for each other are many times slower.
torch.set_num_threads(1)

DEVICE = os.environ.get("BNCLI_TEST_DEVICE", "cpu")  # tests/benchmarks/gpu.sh runs some tests on cuda

# Small enough for a second, large enough to learn something; float32, so that it runs everywhere alike.
TINY = f"""
data: {{name: synthetic, num_train: 500, num_test: 120}}
model: {{widths: [8, 16], blocks_per_stage: 1}}
train: {{epochs: 2, batch_size: 50, learning_rate: 0.1}}
runtime: {{device: {DEVICE}, precision: float32, threads: 1, eval_batch_size: 60}}
"""


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Bncli = Callable[..., Outcome]


def save_as_if_whole(content: dict[str, object], path: Path) -> None:
    """With digests that match, as a program would write it that means what it writes."""
    content = {key: value for key, value in content.items() if key != "digests"}
    torch.save({**content, "digests": digest_parts(content)}, path)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: it is not searched for garbage again and again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def same_start_for_every_test() -> Iterator[None]:
    """No test depends on what one before it left: random numbers, threads, variables of the environment."""
    torch.manual_seed(0)
    environment = dict(os.environ)
    yield
    torch.set_num_threads(1)
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture
def bncli(capfd: pytest.CaptureFixture[str]) -> Bncli:
    """Call the program as its entry point does, so that exit codes are the real ones."""

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def finished_run(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of TINY; tests only read it."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", str(tiny_config), "--run-dir", str(run_dir)]) == 0
    return run_dir
