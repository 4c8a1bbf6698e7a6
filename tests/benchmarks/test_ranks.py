import pytest

from tests.benchmarks.conftest import Benchmark
from tests.benchmarks.ranks import ONE, TWO_RANKS, TWO_THREADS, app

SMALL = (app, "--rounds", 1, "--images", 12, "--batch-size", 4, "--image-size", 32)


@pytest.mark.slow
def test_the_bench_prints_speeds_ratios_and_memory(benchmark: Benchmark) -> None:
    result = benchmark(*SMALL, "--json").json
    assert [one["name"] for one in result["ways"]] == [ONE, TWO_THREADS, TWO_RANKS]
    for one in result["ways"]:
        assert one["images_per_second"] > 0
        assert one["ratio"] == one["ratio_min"] == one["ratio_max"]
        assert 50 < one["peak_mib"] < 5000
    assert result["ways"][0]["ratio"] == 1
    out = benchmark(*SMALL, "--method", "exact").out
    for word in (TWO_RANKS, "images/s", "Measuring by exact", "n = 1 rounds"):
        assert word in out


def test_an_unknown_network_is_refused(benchmark: Benchmark) -> None:
    outcome = benchmark(app, "--network", "resnet8")
    assert outcome.code == 2
    assert "--network: torchvision has no classifier 'resnet8'" in outcome.err
