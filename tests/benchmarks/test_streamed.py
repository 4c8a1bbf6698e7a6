"""The benchmark of streamed images on few of them: they are like photos, and its figures are figures."""

from pathlib import Path

import pytest
from PIL import Image

from tests.benchmarks.conftest import Benchmark
from tests.benchmarks.streamed import app, make_images

SMALL = (app, "--rounds", 1, "--images", 24, "--batch-size", 8, "--image-size", 32, "--workers", 2)


def test_images_take_as_many_bytes_as_photos_do(tmp_path: Path) -> None:
    root = make_images(tmp_path / "images", 10, 224)
    files = sorted((root / "train").rglob("*.jpg"))
    assert len(files) == 10
    assert len({file.read_bytes() for file in files}) == 10
    assert all(30_000 < file.stat().st_size < 100_000 for file in files)
    for file in files:
        with Image.open(file) as image:
            assert image.size == (224, 224)


@pytest.mark.slow
def test_the_bench_prints_ratios_and_peaks_and_leaves_nothing(benchmark: Benchmark, tmp_path: Path) -> None:
    options = ("--memory", "16,40", "--memory-image-size", 32, "--dir", tmp_path)
    found = benchmark(*SMALL, *options, "--json").json
    assert [one["tool"] for one in found["times"]] == [
        "plain evaluation", "bncli.recalibrate", "bncli recalibrate",
    ]  # fmt: skip
    assert found["times"][0]["ratio"] == 1
    assert all(one["ratio_min"] > 0 for one in found["times"])
    assert [one["num_images"] for one in found["peaks"]] == [16, 40]
    assert all(100 < one["mib"] < 2000 for one in found["peaks"])
    assert list(tmp_path.iterdir()) == []
    out = benchmark(*SMALL, "--only", "speed").out
    assert "Peak of memory" not in out
    assert "24 JPEGs of 32x32" in out
    outcome = benchmark(app, "--only", "memory", *options)
    assert "One pass" not in outcome.out
    assert "memory: recalibrates 40 images" in outcome.err


@pytest.mark.parametrize("wrong", ["many", "0,5", "1000;5000"])
def test_wrong_numbers_of_images_are_refused(benchmark: Benchmark, wrong: str) -> None:
    outcome = benchmark(*SMALL, "--memory", wrong)
    assert outcome.code == 2
    assert "--memory: expected numbers of images such as 1000,5000" in outcome.err
