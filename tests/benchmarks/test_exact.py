import pytest

from tests.benchmarks.conftest import Benchmark
from tests.benchmarks.exact import app

SMALL = (app, "--network", "resnet18", "--rounds", 2, "--images", 20, "--batch-size", 10, "--image-size", 32)


@pytest.mark.slow
def test_the_bench_prints_the_ratio_and_what_was_kept_where(benchmark: Benchmark) -> None:
    in_memory, on_disk, nowhere = (
        benchmark(*SMALL, *options, "--json").json
        for options in ((), ("--memory", 0), ("--memory", 0, "--disk", 0))
    )
    assert in_memory["used_bytes"] == nowhere["used_bytes"] == 0
    assert 2**19 < on_disk["used_bytes"] < on_disk["disk_bytes"]
    assert nowhere["disk_bytes"] == 0
    assert nowhere["forward_passes"] > 1.3 * on_disk["forward_passes"]
    for result in (in_memory, on_disk, nowhere):
        assert [one["tool"] for one in result["times"]] == ["plain forward", "bncli exact"]
        assert result["times"][0]["ratio"] == 1
        assert 0 < result["times"][1]["ratio_min"] <= result["times"][1]["ratio_max"]
        assert (result["num_passes"], result["num_layers"]) == (17, 20)
    out = benchmark(*SMALL, "--memory", 0).out
    for word in ("bncli exact", "forward passes in FLOPs", "in 0 MiB of memory", "n = 2 rounds"):
        assert word in out


def test_an_unknown_network_is_refused(benchmark: Benchmark) -> None:
    outcome = benchmark(app, "--network", "resnet8")
    assert outcome.code == 2
    assert "--network: torchvision has no classifier 'resnet8'" in outcome.err
