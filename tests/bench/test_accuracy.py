import json
import statistics
from pathlib import Path

import pytest

from bncli.bench import TrainedSeed
from bncli.bench.accuracy import reach
from bncli.config_file import load_config
from bncli.training import train
from tests.conftest import Bncli

SEEDS = [
    TrainedSeed(0, ((10.0, 0.70), (20.0, 0.85), (30.0, 0.80)), 31.0, 100.0),
    TrainedSeed(1, ((11.0, 0.60), (22.0, 0.80), (33.0, 0.90)), 34.0, None),
    TrainedSeed(2, ((12.0, 0.50), (24.0, 0.60), (36.0, 0.70)), 37.0, 90.0),
]


def test_an_accuracy_is_reached_at_the_end_of_the_first_epoch_that_has_it() -> None:
    times = [seed.seconds_to(0.8) for seed in SEEDS]
    assert times == [20.0, 22.0, None]
    target = reach(0.8, SEEDS)
    assert (target.num_reached, target.seconds_mean) == (2, 21.0)
    assert target.seconds_std == pytest.approx(statistics.stdev([20, 22]))
    assert SEEDS[0].accuracy == 0.80  # of the last epoch, not of the best


def test_what_was_reached_once_or_never_has_no_deviation() -> None:
    assert (reach(0.9, SEEDS).seconds_mean, reach(0.9, SEEDS).seconds_std) == (33.0, None)
    assert (reach(0.95, SEEDS).num_reached, reach(0.95, SEEDS).seconds_mean) == (0, None)


def test_the_runs_are_those_of_bncli_train(bncli: Bncli, tiny_config: Path, tmp_path: Path) -> None:
    outcome = bncli(
        *("bench", "accuracy", tiny_config, "--seeds", 2, "--target", "0.99,0.01", "--json"),
        *("--set", "train.epochs=3"),
    )
    assert outcome.code == 0, outcome.err
    for found in outcome.json["seeds"]:
        train(
            load_config(tiny_config, ["train.epochs=3", f"train.seed={found['seed']}"]),
            tmp_path / str(found["seed"]),
        )
        lines = (tmp_path / str(found["seed"]) / "metrics.jsonl").read_text().splitlines()
        seconds, accuracies = zip(*found["epochs"], strict=True)
        assert list(accuracies) == [json.loads(line)["test_accuracy"] for line in lines]
        assert (
            0.5 < seconds[0] <= seconds[1] <= seconds[2] <= found["seconds"]
        )  # importing torch takes longer
        assert found["peak_mib"] > 100
    reached = {target["accuracy"]: target["num_reached"] for target in outcome.json["targets"]}
    assert reached == {0.01: 2, 0.99: 0}
    firsts = [seed["epochs"][0][0] for seed in outcome.json["seeds"]]
    assert outcome.json["targets"][0]["seconds_mean"] == pytest.approx(sum(firsts) / 2)


def test_a_run_that_fails_is_quoted_in_one_line(bncli: Bncli, tiny_config: Path) -> None:
    outcome = bncli("bench", "accuracy", tiny_config, "--set", "train.batch_size=5000")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "the run with seed 0 failed: " in outcome.err
    assert "train.batch_size: 5000 is more than the 500 training images" in outcome.err


@pytest.mark.parametrize("text", ["", "0.8,", "80", "1", "0", "nan", "high"])
def test_targets_that_are_no_fractions_are_refused(bncli: Bncli, tiny_config: Path, text: str) -> None:
    outcome = bncli("bench", "accuracy", tiny_config, "--target", text)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "--target" in outcome.err
