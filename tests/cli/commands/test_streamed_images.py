"""The commands on images that are decoded whenever they are used: every number as with a cache."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bncli.checkpoints import load_checkpoint
from tests.conftest import Bncli

CONFIG = """
data: {{name: imagefolder, root: {root}, cache: {cache},
       image_size: 12, stream: {stream}, workers: {workers}}}
model: {{widths: [4, 8], blocks_per_stage: 1}}
train: {{epochs: 2, batch_size: 16, learning_rate: 0.1, recalibrate: precise, checkpoint_unit: steps}}
runtime: {{device: cpu, precision: float32, threads: 1, eval_batch_size: 10}}
"""
VARYING = {"seconds", "images_per_second", "checkpoint", "machine", "latency_ms"}


def without_times(found: object) -> object:
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items() if key not in VARYING}
    return [without_times(item) for item in found] if isinstance(found, list) else found


class Twins:
    """The same folder of images twice: in the cache, and streamed."""

    def __init__(self, base: Path) -> None:
        self.base = base
        rng = np.random.default_rng(0)
        for split, count in (("train", 24), ("test", 7)):
            for label, name in enumerate(("dark", "light")):
                folder = base / "images" / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(60 * label, 196 + 60 * label, (14, 15, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.png")

    def config(self, *, stream: bool, workers: int = 0) -> Path:
        path = self.base / f"stream-{stream}-{workers}.yaml"
        values = {"root": self.base / "images", "cache": self.base / "cache"}
        path.write_text(CONFIG.format(**values, stream=str(stream).lower(), workers=workers))
        return path

    def run_dir(self, *, stream: bool) -> Path:
        return self.base / f"run-{stream}"


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins(tmp_path_factory.mktemp("twins"))


@pytest.fixture
def trained(twins: Twins, bncli: Bncli) -> Twins:
    """The twins with a run each."""
    for stream in (False, True):
        run_dir = twins.run_dir(stream=stream)
        if not run_dir.exists():
            assert bncli("train", twins.config(stream=stream), "--run-dir", run_dir).code == 0
    return twins


def test_training_ends_with_the_same_bits(trained):
    for name in ("last.pt", "recalibrated.pt"):
        kept, streamed = (load_checkpoint(trained.run_dir(stream=stream) / name) for stream in (False, True))
        assert (kept.mean, kept.std) == (streamed.mean, streamed.std)
        assert kept.state_dict.keys() == streamed.state_dict.keys()
        for key, tensor in kept.state_dict.items():
            assert torch.equal(tensor, streamed.state_dict[key]), key
        assert streamed.test_loss == kept.test_loss


@pytest.mark.slow
def test_eval_finds_the_same(trained, bncli):
    found = []
    for stream in (False, True):
        options = ["--gap", "--sweep", "2,5", "--num-images", "9", "--batch-sizes", "3", "--json"]
        places = ["--set", f"data.stream={str(stream).lower()}", "--set", "data.workers=0"]
        places += ["--set", f"data.cache={trained.base / 'cache'}"]
        file = trained.run_dir(stream=False) / "last.pt"
        outcome = bncli("eval", file, *options, *places, "--data-root", trained.base / "images")
        assert outcome.code == 0, outcome.err
        found.append(without_times(outcome.json))
    assert found[0]["gap"] is not None
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["precise", "exact"])
def test_recalibrate_measures_the_same(trained, bncli, tmp_path, method):
    found = []
    for stream in (False, True):
        file = tmp_path / f"{stream}.pt"
        places = [f"data.stream={str(stream).lower()}", f"data.cache={trained.base / 'cache'}"]
        outcome = bncli(
            *("recalibrate", trained.run_dir(stream=False) / "last.pt", "-o", file, "--method", method),
            *("--num-images", "40", "--verify", "--max-error", "1e6"),
            *(word for place in (*places, "data.workers=0") for word in ("--set", place)),
            *("--data-root", trained.base / "images"),
        )
        assert outcome.code == 0, outcome.err
        found.append(load_checkpoint(file))
    for key, tensor in found[0].state_dict.items():
        assert torch.equal(tensor, found[1].state_dict[key]), key


def test_a_streamed_run_finds_its_own_images_and_no_others(trained, bncli, tmp_path):
    file = trained.run_dir(stream=True) / "last.pt"
    assert load_checkpoint(file).data_digest.startswith("listing:")
    assert bncli("eval", file, "--num-images", "2", "--batch-sizes", "2").code == 0
    more = trained.base / "images" / "train" / "dark" / "more.png"
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(more)
    try:
        outcome = bncli("eval", file, "--num-images", "2", "--batch-sizes", "2")
    finally:
        more.unlink()
    assert outcome.code == 2
    assert "other images or labels" in outcome.err


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(trained, bncli, tmp_path):
    """With workers; stopped in the middle of an epoch by a train function that is asked to stop."""
    from bncli import load_config, train
    from bncli.errors import StoppedError

    config = load_config(trained.config(stream=True, workers=2))
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 5

    with pytest.raises(StoppedError):
        train(config, tmp_path / "run", stop=stop)
    assert bncli("train", "--resume", tmp_path / "run").code == 0
    whole, resumed = (
        load_checkpoint(folder / "last.pt") for folder in (trained.run_dir(stream=False), tmp_path / "run")
    )
    for key, tensor in whole.state_dict.items():
        assert torch.equal(tensor, resumed.state_dict[key]), key
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]


def test_a_damaged_image_is_one_line_and_nothing_is_written(trained, bncli, tmp_path):
    damaged = trained.base / "images" / "train" / "light" / "3.png"
    content = damaged.read_bytes()
    try:
        damaged.write_bytes(content[:-30] + b"0" * 30)
        outcome = bncli(
            *("recalibrate", trained.run_dir(stream=True) / "last.pt", "-o", tmp_path / "new.pt"),
            *("--data-root", trained.base / "images", "--set", "data.workers=2"),
        )
    finally:
        damaged.write_bytes(content)
    assert outcome.code == 2
    assert str(damaged) in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "new.pt").exists()
