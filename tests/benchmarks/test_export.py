from pathlib import Path

import pytest

from tests.benchmarks.conftest import Benchmark
from tests.benchmarks.export import app


@pytest.mark.slow
def test_the_checkpoint_and_its_exports_take_turns(benchmark: Benchmark, finished_run: Path) -> None:
    outcome = benchmark(app, finished_run / "last.pt", "--rounds", 2, "--only", ".pt2", "--json")
    assert outcome.code == 0, outcome.err
    rows = {row["name"]: row for row in outcome.json["rows"]}
    assert list(rows) == ["checkpoint", ".pt2"]
    for row in rows.values():
        assert len(row["predict_seconds"]) == 2
    assert rows[".pt2"]["largest_difference"] < 1e-3
    assert rows[".pt2"]["export_seconds"] > 0
