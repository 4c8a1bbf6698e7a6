import sys

import pytest

from tests.benchmarks.conftest import Benchmark
from tests.benchmarks.population import app

SMALL = (app, "--rounds", 2, "--images", 4, "--batch-size", 2, "--image-size", 32)


@pytest.mark.slow
def test_the_bench_prints_errors_and_ratios_beside_the_rivals(benchmark: Benchmark) -> None:
    result = benchmark(*SMALL, "--json").json
    assert [one["cut"] for one in result["errors"]] == ["equal", "unequal", "single image"]
    for one in result["errors"]:
        assert sum(one["batch_sizes"]) == 128
        assert one["mean"]["bncli"] <= 1e-10
        assert one["var"]["bncli"] <= 1e-10
        assert one["var"]["fvcore"] > 0.1  # cancelled away
        assert 1e-4 < one["var"]["update_bn"] < 0.2
    times = {one["tool"]: one for one in result["times"]}
    assert set(times) == {"plain forward", "bncli precise", "fvcore", "update_bn", "bncli exact"}
    assert times["plain forward"]["ratio"] == 1
    for one in times.values():
        assert 0 < one["ratio_min"] <= one["ratio"] <= one["ratio_max"]
    assert times["bncli exact"]["ratio"] > times["bncli precise"]["ratio"]
    assert result["exact_forward_passes"] < 0.6 * result["num_layers"]
    assert result["num_rounds"] == 2
    out = benchmark(*SMALL).out
    for word in ("update_bn", "single image", "forward passes in FLOPs", "n = 2 rounds"):
        assert word in out


def test_without_fvcore_the_bench_says_so(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fvcore.nn.precise_bn", None)
    outcome = benchmark(*SMALL)
    assert outcome.code == 2
    assert "pip install fvcore" in outcome.err


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("resnet8", "torchvision has no classifier 'resnet8'; did you mean resnet18?"),
        ("vgg11", "vgg11 has no BatchNorm"),
        ("inception_v3", "inception_v3 cannot take 32x32 pixels: "),
    ],
)
def test_a_network_that_cannot_be_measured_is_named(benchmark: Benchmark, network: str, message: str) -> None:
    outcome = benchmark(*SMALL, "--network", network)
    assert outcome.code == 2
    assert f"--network: {message}" in outcome.err


@pytest.mark.slow
def test_another_network_is_measured(benchmark: Benchmark) -> None:
    # more images, since in each of the passes two are computed twice for a trial
    more = ("--images", 40, "--batch-size", 20)
    result = benchmark(*SMALL, *more, "--network", "mobilenet_v3_small", "--json").json
    assert (result["network"], result["num_layers"]) == ("torchvision mobilenet_v3_small", 34)
    assert result["exact_forward_passes"] < 0.2 * 34
