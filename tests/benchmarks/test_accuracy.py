import statistics
from pathlib import Path

import pytest

from bncli.errors import ConfigError
from tests.benchmarks.accuracy import _new_lines, app, parse_targets
from tests.benchmarks.conftest import Benchmark
from tests.benchmarks.time_to_accuracy import (
    EpochSeen,
    SeedRun,
    first_reached,
    parse_epochs,
    spread_of,
    summarize_target,
)
from tests.conftest import TINY


def run_of(*accuracies: float, seed: int = 0, pace: float = 10.0) -> SeedRun:
    seen = tuple(EpochSeen(n, value, pace * n) for n, value in enumerate(accuracies, start=1))
    return SeedRun(seed, seen, accuracies[-1], pace * len(seen) + 1, 100.0)


def test_the_first_epoch_that_is_good_enough_counts_even_if_a_later_one_is_worse() -> None:
    run = run_of(0.5, 0.8, 0.7, 0.9)
    assert [first_reached(run, value) for value in (0.5, 0.6, 0.8, 0.85, 0.91)] == [10, 20, 20, 40, None]


def test_mean_and_deviation_are_the_samples() -> None:
    runs = [run_of(0.9, pace=pace) for pace in (10.0, 12.0, 17.0)]
    target = summarize_target(runs, 0.9)
    assert target.seconds == (10.0, 12.0, 17.0)
    assert target.num_reached == 3
    assert target.seconds_mean == pytest.approx(13.0)
    assert target.seconds_std == pytest.approx(statistics.stdev([10.0, 12.0, 17.0]))


def test_a_target_that_one_seed_missed_has_no_mean() -> None:
    target = summarize_target([run_of(0.9), run_of(0.8), run_of(0.95)], 0.85)
    assert target.seconds == (10.0, None, 10.0)
    assert target.num_reached == 2
    assert target.seconds_mean is target.seconds_std is None


def test_one_seed_has_a_mean_and_no_deviation() -> None:
    target = summarize_target([run_of(0.9)], 0.9)
    assert (target.seconds_mean, target.seconds_std) == (10.0, None)
    assert spread_of([0.25]).std is None


def test_half_a_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert _new_lines(path, 0) == ([], 0)
    first, second = '{"epoch": 1, "test_accuracy": 0.5}', '{"epoch": 2, "test_accuracy": 0.75}'
    path.write_text(f"{first}\n{second[:9]}")
    lines, num_read = _new_lines(path, 0)
    assert lines == [first]
    assert _new_lines(path, num_read) == ([], num_read)
    path.write_text(f"{first}\n{second}\n")
    assert parse_epochs(_new_lines(path, num_read)[0], 3.0) == (EpochSeen(2, 0.75, 3.0),)


@pytest.mark.parametrize("text", ["", "high", "0", "1", "0.5,1.5", "-0.1", "nan", "0.9,"])
def test_what_is_no_accuracy_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--target: expected accuracies above 0 and below 1"):
        parse_targets(text)


def test_targets_come_in_rising_order_each_once() -> None:
    assert parse_targets("0.9, 0.8,0.9") == (0.8, 0.9)


@pytest.mark.slow
def test_each_seed_is_trained_and_timed_from_the_start_of_its_process(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    outcome = benchmark(
        *(app, tmp_path / "tiny.yaml", "--target", "0.0001,0.9999", "--seeds", 1, "--json"),
        *("--set", "data.num_train=200", "--tta", "flip"),
    )
    assert outcome.code == 0
    (run,), (low, high) = outcome.json["seeds"], outcome.json["targets"]
    assert [seen["epoch"] for seen in run["epochs"]] == [1, 2]
    assert run["epochs"][0]["seconds"] > 0.5  # an interpreter that imports torch
    assert run["epochs"][0]["seconds"] <= run["epochs"][1]["seconds"] <= run["seconds"]
    assert run["accuracy"] == run["epochs"][1]["accuracy"] == outcome.json["final"]["mean"]
    assert 50 < run["peak_mib"] < 5000
    assert low["seconds"] == [run["epochs"][0]["seconds"]]
    assert high["seconds_mean"] is None
    assert outcome.json["tta"]["views"] == "flip"
    assert outcome.json["tta"]["accuracy"]["mean"] == run["tta_accuracy"]
    assert 0 < outcome.json["tta"]["seconds"]["mean"] == run["tta_seconds"] < run["seconds"]
    assert "train.seed=K" in outcome.json["command"]
    assert outcome.json["runtime"]["precision"] == "float32"
    assert 1 < outcome.json["peak_gflops_per_second"] < 1e6


@pytest.mark.slow
def test_a_run_that_fails_shows_its_last_line(benchmark: Benchmark, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = (app, tmp_path / "tiny.yaml", "--target", "0.5", "--set")
    # the data are the run's own affair, so it is the run that does not find them
    outcome = benchmark(*command, f"data={{name: imagefolder, root: {tmp_path / 'missing'}}}")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "seed 0: bncli ended with 2" in outcome.err
    assert str(tmp_path / "missing") in outcome.err
    # a configuration that nobody can run is refused before any is started
    outcome = benchmark(*command, "train.epochs=none")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "seed 0" not in outcome.err
    assert "train.epochs" in outcome.err
