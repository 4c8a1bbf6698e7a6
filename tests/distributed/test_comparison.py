"""The table of what several ways make of running statistics."""

from pathlib import Path

import pytest

from tests.distributed.comparison import compare

pytestmark = pytest.mark.slow


def test_bncli_alone_has_the_statistics_of_one_process(tmp_path: Path) -> None:
    small = ["data.num_train=300", "data.num_test=60", "train.epochs=2", "model.widths=[6, 8]"]
    lines = {line.name: line for line in compare([*small, "model.blocks_per_stage=1"], tmp_path)}
    assert max(lines["bncli"].mean_error, lines["bncli"].var_error) < 1e-9
    assert max(lines["bncli with sync (other weights)"].mean_error, 0) < 1e-9
    others = [line for name, line in lines.items() if "DDP" in name or "timm" in name or "update_bn" in name]
    assert len(others) == 5
    assert min(line.var_error for line in others) > 0.01
    assert lines["DDP as it comes, rank 0"] != lines["DDP as it comes, rank 1"]
    assert "only work with GPU modules" in (tmp_path / "sync.txt").read_text()
    # half of the images are a sample of them, and no more
    assert lines["update_bn on rank 0, its images"].population_var_error > 0.01
