import pytest

from tests.benchmarks.conftest import Benchmark
from tests.benchmarks.report import app


@pytest.mark.slow
def test_both_commands_take_turns_and_the_page_is_measured(benchmark: Benchmark) -> None:
    outcome = benchmark(app, "--layers", 20, "--rounds", 1, "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert found["num_layers"] == 20
    assert len(found["inspect_seconds"]) == len(found["report_seconds"]) == 1
    assert 0.5 < found["page_megabytes"] < 2
