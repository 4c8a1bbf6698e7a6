"""The benchmark of loading on a small file: both load the same numbers, and its figures are figures."""

from pathlib import Path

import pytest
import torch

from tests.benchmarks.loading import bench_loading, empty_network, load


def test_both_loaders_load_the_same_numbers(tmp_path: Path) -> None:
    saved = empty_network(1)
    for tensor in saved.state_dict().values():
        tensor.random_(1, 100)
    torch.save({"state_dict": {f"module.{k}": v for k, v in saved.state_dict().items()}}, tmp_path / "a.pt")
    for loader in ("bncli", "PyTorch"):
        network = empty_network(1)
        load(loader, network, tmp_path / "a.pt")
        expected = saved.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


@pytest.mark.slow
def test_the_bench_times_each_round_and_leaves_nothing(tmp_path: Path) -> None:
    found = bench_loading(0.1, 2, tmp_path)
    assert {len(times) for times in found.seconds.values()} == {2}
    assert {len(times) for times in found.writing_seconds.values()} == {2}
    assert found.ratio > 0
    assert found.writing_ratio > 0
    assert found.peak_mib["PyTorch"] > 0.8 * 1024 * found.gib > 10 * found.peak_mib["bncli"]
    assert list(tmp_path.iterdir()) == []
