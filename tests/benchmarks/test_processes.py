"""The benchmark of several processes: what it measures, and the slow network that it simulates."""

import time
from pathlib import Path

import pytest

from tests.benchmarks import processes
from tests.benchmarks.conftest import Benchmark
from tests.benchmarks.processes_worker import Link


def test_a_slow_link_takes_its_turn_its_bytes_and_its_hops() -> None:
    link = Link(num_ranks=4, delay=0.5, gigabits=1e-3)
    start = time.perf_counter()
    # 2 (N - 1) rounds of a quarter of 1,000 bytes each, at 1 Mbit/s
    assert link.end_of(1000, reduces=True) - start == pytest.approx(6 * 250 * 8 / 1e6 + 6 * 0.5, abs=1e-3)
    # the next begins when the link is free: N - 1 rounds of all bytes
    second = link.end_of(1000, reduces=False) - start
    assert second == pytest.approx(6 * 250 * 8 / 1e6 + 3 * 1000 * 8 / 1e6 + 3 * 0.5, abs=2e-3)


@pytest.mark.slow
def test_every_way_computes_the_same_steps(benchmark: Benchmark, tiny_config: Path) -> None:
    # a network so slow that the exchange is most of a step
    options = ("--rounds", "1", "--steps", "2", "--delay", "100", "--gigabits", "0.01")
    outcome = benchmark(processes.app, tiny_config, *options, "--json")
    assert outcome.code == 0, outcome.err
    result = outcome.json
    ways = {each["way"]["name"]: each for each in result["ways"]}
    assert list(ways) == [
        "2 processes",
        "1 process, 1 thread",
        "1 process, 2 threads",
        "the same, whole batches",
        "2 processes, slow network",
    ]
    assert len(ways["2 processes"]["memory_mib"]) == 2
    assert (result["batch_size"], result["part_size"]) == (50, 25)
    # at least the two rounds of an all-reduce, each 0.1 s, beside which a gather takes one
    assert ways["2 processes, slow network"]["images_per_second"] < 50 / 0.2
    table = benchmark(processes.app, tiny_config, *options).out
    assert max(map(len, table.splitlines())) <= 80
