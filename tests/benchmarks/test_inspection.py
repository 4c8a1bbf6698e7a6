from pathlib import Path

import pytest
import torch

from bncli.batchnorm import read_running_stats
from bncli.checkpoints import open_checkpoint
from tests.benchmarks.conftest import Benchmark
from tests.benchmarks.inspection import (
    _state_dict,
    _write_safetensors,
    _write_torch_zip,
    app,
    bench_inspection,
)


@pytest.mark.parametrize("write", [_write_torch_zip, _write_safetensors])
def test_the_files_hold_the_layers_that_were_written_and_take_hardly_any_disk(tmp_path: Path, write) -> None:
    state = _state_dict(3, 2**30)
    write(tmp_path / "model.pt", state)
    status = (tmp_path / "model.pt").stat()
    assert 2**30 <= status.st_size < 2**30 + 2**20
    assert status.st_blocks * 512 < 2**20
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        layers = checkpoint.layers()
    expected = read_running_stats({name: value for name, value in state.items() if ".norm." in name})
    for ours, theirs in zip(layers, expected, strict=True):
        assert torch.equal(ours.running_mean, theirs.running_mean)
        assert torch.equal(ours.running_var, theirs.running_var)
        assert ours.num_batches_tracked == theirs.num_batches_tracked == 1000


@pytest.mark.slow
def test_all_files_are_measured_and_removed(tmp_path: Path) -> None:
    result = bench_inspection(gib=0.01, num_layers=5, many_layers=50, directory=tmp_path)
    assert [item.file for item in result.inspections] == [
        "torch zip", "safetensors", "safetensors", "distributed", "torch zip",
    ]  # fmt: skip
    assert [item.num_layers for item in result.inspections] == [5, 5, 5, 5, 50]
    assert [item.num_tensors for item in result.inspections] == [30, 30, 30, 30, 300]
    for item in result.inspections:
        assert item.seconds > 0.1  # a process that imports torch
        assert item.peak_mib > 50
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(benchmark: Benchmark, tmp_path: Path) -> None:
    outcome = benchmark(app, "--dir", tmp_path / "nowhere")
    assert outcome.code == 2
    assert "No such file" in outcome.err
