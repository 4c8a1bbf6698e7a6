"""A checkpoint so small that a command on it takes milliseconds."""

from pathlib import Path

import pytest

from bncli.cli.app import main

SMALLEST = """
data: {name: synthetic, num_train: 20, num_test: 10}
model: {widths: [2], blocks_per_stage: 1}
train: {epochs: 1, batch_size: 10, learning_rate: 0.1}
runtime: {device: cpu, precision: float32, threads: 1, eval_batch_size: 10}
"""


@pytest.fixture(scope="session")
def smallest_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smallest") / "smallest.yaml"
    path.write_text(SMALLEST)
    return path


@pytest.fixture(scope="session")
def smallest_run(smallest_config: Path) -> Path:
    run_dir = smallest_config.parent / "run"
    assert main(["train", str(smallest_config), "--run-dir", str(run_dir)]) == 0
    return run_dir
