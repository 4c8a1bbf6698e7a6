"""A run of a second that checkpoints often, and what its files hold apart from times."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bncli.checkpoints.part_digests import digest_parts
from bncli.config_file import load_config
from bncli.training import train
from tests.conftest import DEVICE, Bncli, Outcome, save_as_if_whole

# 5 epochs of 4 steps, with a smaller last batch; 3 does not divide 4, so checkpoints fall everywhere
FAULTY = f"""
data: {{name: synthetic, num_train: 90, num_test: 20}}
augment: {{cutout: 8}}
model: {{widths: [4, 8], blocks_per_stage: 1}}
train: {{epochs: 5, batch_size: 25, last_batch: keep, learning_rate: 0.1, checkpoint_every: 3,
  checkpoint_unit: steps}}
runtime: {{device: {DEVICE}, precision: float32, threads: 1}}
"""


def content_of(path: Path) -> dict[str, str]:
    """Digests of everything in a checkpoint but the time that it took."""
    content = torch.load(path, weights_only=True)
    del content["digests"], content["seconds"]
    if content["running_epoch"] is not None:
        del content["running_epoch"]["seconds"]
    return digest_parts(content)


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in {"seconds", "images_per_second"}}
        for line in lines
    ]


def same_run(first: Path, second: Path) -> bool:
    """Whether two runs ended alike: every bit of both checkpoints, and all metrics."""
    names = [sorted(path.name for path in run_dir.iterdir()) for run_dir in (first, second)]
    assert names == [[".lock", "best.pt", "config.yaml", "last.pt", "metrics.jsonl"]] * 2
    assert metrics_of(first) == metrics_of(second)
    return all(content_of(first / name) == content_of(second / name) for name in ("last.pt", "best.pt"))


def resume_forged(bncli: Bncli, run_dir: Path, change: Callable[[dict[str, Any]], object]) -> Outcome:
    """Change what is in last.pt, as a program would that means it, and resume for one epoch more."""
    content = torch.load(run_dir / "last.pt", weights_only=True)
    change(content)
    save_as_if_whole(content, run_dir / "last.pt")
    return bncli("train", "--resume", run_dir, "--set", "train.epochs=6")


@pytest.fixture(scope="session")
def faulty_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "faulty.yaml"
    path.write_text(FAULTY)
    return path


@pytest.fixture(scope="session")
def whole_run(faulty_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted run; tests only read it."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train(load_config(faulty_config), run_dir)
    return run_dir
