from pathlib import Path

import pytest
import torch

from bncli.config_file import load_config
from bncli.training import prepare
from tests.benchmarks import scale
from tests.benchmarks.conftest import Benchmark
from tests.benchmarks.scale import _resized, app


@pytest.mark.slow
def test_speed_memory_and_start_are_measured_on_real_runs(benchmark: Benchmark, tiny_config: Path) -> None:
    arguments = (app, tiny_config, "--sizes", "150,700", "--rounds", 2, "--steps", 2)
    outcome = benchmark(*arguments, "--starts", 1, "--json")
    assert outcome.code == 0
    result = outcome.json
    assert [size["num_images"] for size in result["sizes"]] == [150, 700]
    assert result["sizes"][0]["ratio"] == 1
    for size in result["sizes"]:
        assert 0 < size["ratio_min"] <= size["ratio"] <= size["ratio_max"]
        assert size["images_per_second"] > 0
    assert 0.2 < result["peak_memory_gib"] < 2  # torch alone is 0.2
    assert result["start_seconds"] > result["plain_start_seconds"] > 0.3  # it does the same, and more
    assert result["start_ratio"] == pytest.approx(result["start_seconds"] / result["plain_start_seconds"])
    assert result["num_train_images"] == 500
    assert result["machine"]["torch"] == str(torch.__version__)


def test_a_size_is_made_of_the_first_images_again_and_again(tiny_config: Path) -> None:
    setup = prepare(load_config(tiny_config))
    train = setup.dataset.train
    larger, smaller = _resized(setup, 1100), _resized(setup, 120)
    assert torch.equal(larger.dataset.train.images[500:1000], train.images)
    assert torch.equal(larger.dataset.train.labels[1000:], train.labels[:100])
    assert torch.equal(smaller.dataset.train.images, train.images[:120])
    assert (larger.plan.num_steps, smaller.plan.num_steps) == (22, 2)
    assert larger.plan.batch_size == setup.plan.batch_size


@pytest.mark.parametrize("sizes", ["many", "100", "1000,99999999999"])
def test_sizes_that_cannot_be_measured_are_refused(
    benchmark: Benchmark, tiny_config: Path, sizes: str
) -> None:
    outcome = benchmark(app, tiny_config, "--sizes", sizes)
    assert outcome.code == 2
    assert "--sizes" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_every_round_sees_whole_images(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(scale, "_measure_starts", lambda *_: [(2.0, 1.0)])
    monkeypatch.setattr(scale, "_peak_memory", lambda _: 1.0)
    monkeypatch.setattr(scale, "_measure_sizes", lambda setup, *_: seen.append(setup.config.augment) or ())
    config = load_config(tiny_config, ["augment.small_epochs=1", "augment.crop_padding=3"])
    scale.bench_scale(config, sizes=[500])
    assert (seen[0].small_epochs, seen[0].crop_padding) == (0, 3)
