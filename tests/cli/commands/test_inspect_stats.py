import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import Bncli, Outcome, save_as_if_whole


def codes(outcome: Outcome) -> set[str]:
    return {finding["code"] for finding in outcome.json["findings"]}


def test_measured_statistics_are_not_said_to_hold_a_start(
    bncli: Bncli, finished_run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    assert "BN002" in codes(bncli("inspect-stats", finished_run / "last.pt", "--json"))
    for layers, has_start in (("*", False), ("stages.0.*", True)):
        made = tmp_path / f"{has_start}.pt"
        recalibrated = bncli("recalibrate", finished_run / "last.pt", "-o", made, "--layers", layers)
        assert recalibrated.code == 0
        assert ("BN002" in codes(bncli("inspect-stats", made, "--json"))) == has_start
    averaging = ("--set", "train.ema_epochs=0.5")
    assert bncli("train", tiny_config, "--run-dir", tmp_path / "run", *averaging).code == 0
    for name in ("last.pt", "best.pt"):
        assert "BN002" not in codes(bncli("inspect-stats", tmp_path / "run" / name, "--json"))
    last_step = bncli("inspect-stats", tmp_path / "run" / "last.pt", "--json", "--key", "averaging.last")
    assert "BN002" in codes(last_step)


def test_inspect_stats_keeps_its_contract(bncli: Bncli, finished_run: Path) -> None:
    outcome = bncli("inspect-stats", finished_run / "last.pt", "--json")
    assert outcome.code == 0
    result = outcome.json
    state = torch.load(finished_run / "last.pt", weights_only=True)["state_dict"]
    assert result["num_layers"] == 2
    for layer in result["layers"]:
        assert layer["num_batches_tracked"] == 20
        assert (layer["momentum"], layer["eps"]) == (0.1, 1e-5)
        assert layer["flags"] == ["initial_residue"]  # 0.9 ** 20 is 12 %
        for which in ("running_mean", "running_var", "weight", "bias"):
            values = state[f"{layer['name']}.{which}"].tolist()
            assert len(values) == layer["num_features"]
            assert layer[which] == {
                "min": min(values),
                "median": pytest.approx(statistics.median(values)),
                "max": max(values),
            }


def test_every_layer_has_a_row_and_a_healthy_network_no_finding(bncli: Bncli, finished_run: Path) -> None:
    outcome = bncli("inspect-stats", finished_run / "last.pt", "--ignore", "BN002")
    rows = [line for line in outcome.out.splitlines() if line.startswith("stages.")]
    assert [row.split()[:2] for row in rows] == [["stages.0.0.norm", "8"], ["stages.1.0.norm", "16"]]
    assert "num_batches_tracked 20, momentum 0.1, eps 1e-05" in outcome.out
    assert "No findings: 14 rules checked." in outcome.out


def test_a_glob_selects_layers_and_channels_are_shown_one_by_one(bncli: Bncli, finished_run: Path) -> None:
    outcome = bncli(
        "inspect-stats", finished_run / "last.pt", "--layer", "*.1.*", "--channels", "--ignore", "BN002"
    )
    assert "stages.1.0.norm" in outcome.out
    assert "stages.0.0.norm" not in outcome.out
    assert sum(line.strip()[:1].isdigit() for line in outcome.out.splitlines()) == 16
    as_json = bncli("inspect-stats", finished_run / "last.pt", "--channels", "--json").json
    assert len(as_json["layers"][0]["channels"]["running_var"]) == 8


def test_a_glob_that_matches_nothing_names_the_layers(bncli: Bncli, finished_run: Path) -> None:
    outcome = bncli("inspect-stats", finished_run / "last.pt", "--layer", "nothing*")
    assert outcome.code == 2
    assert "stages.0.0.norm, stages.1.0.norm" in outcome.err


@pytest.mark.parametrize(
    ("key", "value", "flag"),
    [
        ("running_var", float("inf"), "non_finite"),
        ("running_mean", float("nan"), "non_finite"),
        ("running_var", 0.0, "dead_channel"),
        ("running_var", -1.0, "negative_variance"),
        ("weight", 0.0, "dead_channel"),
    ],
)
def test_what_is_wrong_with_a_layer_is_flagged(
    bncli: Bncli, finished_run: Path, tmp_path: Path, key: str, value: float, flag: str
) -> None:
    content = torch.load(finished_run / "last.pt", weights_only=True)
    content["state_dict"][f"stages.1.0.norm.{key}"][3] = value
    save_as_if_whole(content, tmp_path / "bad.pt")
    arguments = ("inspect-stats", tmp_path / "bad.pt", "--ignore", "BN002")
    found = bncli(*arguments, "--json")
    assert [layer["flags"] for layer in found.json["layers"]] == [[], [flag]]
    assert [finding["channels"] for finding in found.json["findings"]] == [[3]]
    assert found.code == (0 if flag == "dead_channel" else 1)
    shown = bncli(*arguments, "--all").out
    assert re.search(rf"BN\d\d\d {flag} \((error|info)\): stages.1.0.norm\n  channel 3 of 16: ", shown)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_the_state_dict_of_any_network_is_read(bncli: Bncli, tmp_path: Path, wrap) -> None:
    torch.save(wrap(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()), tmp_path / "any.pt")
    layer = bncli("inspect-stats", tmp_path / "any.pt", "--json").json["layers"][0]
    assert (layer["name"], layer["num_features"]) == ("1", 4)
    assert (layer["momentum"], layer["eps"], layer["hyperparameters_known"]) == (None, None, False)
    assert layer["flags"] == ["never_updated"]


def test_a_file_without_batch_norm_is_refused(bncli: Bncli, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "plain.pt")
    outcome = bncli("inspect-stats", tmp_path / "plain.pt")
    assert outcome.code == 2
    assert "no BatchNorm layer" in outcome.err


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_written_as_the_suffix_says(
    bncli: Bncli, finished_run: Path, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"plot.{suffix}"
    assert bncli("inspect-stats", finished_run / "last.pt", "--plot", path).code == 0
    start = path.read_bytes()[:100]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in start


def test_another_suffix_is_refused(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    outcome = bncli("inspect-stats", finished_run / "last.pt", "--plot", tmp_path / "plot.xyz")
    assert outcome.code == 2
    assert ".png" in outcome.err


@pytest.mark.parametrize("options", [(), ("--json",), ("--select", "BN003"), ("--key", "ema")])
def test_two_checkpoints_and_a_run_have_commands_of_their_own(
    bncli: Bncli, finished_run: Path, options: tuple[str, ...]
) -> None:
    last = finished_run / "last.pt"
    pair = bncli("inspect-stats", last, last, *options)
    run = bncli("inspect-stats", finished_run, *options)
    assert (pair.code, run.code, pair.out, run.out) == (2, 2, "", "")
    assert f"use bncli compare {last} {last}" in pair.err
    assert f"use bncli history {finished_run}, or inspect-stats {last}" in run.err
    assert pair.err.count("\n") == run.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--explain", "BN002", "--key", "ema"], "--explain BN002: --key: no effect here"),
        (
            ["--explain", "all", "--sort", "gain", "--layer", "x"],
            "--explain all: --layer, --sort: no effect here",
        ),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    bncli: Bncli, finished_run: Path, options: list[str], reason: str
) -> None:
    outcome = bncli("inspect-stats", finished_run, *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert reason in outcome.err
    assert outcome.err.count("\n") == 1
    assert bncli("inspect-stats", "--explain", "BN002", "--json").code == 0


def test_dead_channels_are_a_fact_even_when_the_rule_is_ignored(bncli: Bncli, tmp_path: Path) -> None:
    layer = nn.Sequential(nn.BatchNorm2d(3)).state_dict()
    layer["0.running_var"][1] = 0
    torch.save(layer, tmp_path / "dead.pt")
    asked = bncli("inspect-stats", tmp_path / "dead.pt", "--json").json
    ignored = bncli("inspect-stats", tmp_path / "dead.pt", "--json", "--ignore", "dead_channel").json
    assert asked["layers"][0]["dead_channels"] == ignored["layers"][0]["dead_channels"] == [1]
    assert "dead_channel" not in ignored["layers"][0]["flags"]


@pytest.mark.parametrize(
    ("option", "name"),
    [("--csv", "last.pt"), ("--csv", "net.py"), ("--plot", "last.png"), ("--csv", "link.csv")],
)
def test_neither_an_input_nor_a_program_is_ever_overwritten(
    bncli: Bncli, finished_run: Path, tmp_path: Path, option: str, name: str
) -> None:
    checkpoint = tmp_path / ("last.png" if name == "last.png" else "last.pt")
    checkpoint.write_bytes((finished_run / "last.pt").read_bytes())
    (tmp_path / "net.py").write_text("a program")
    (tmp_path / "link.csv").symlink_to(checkpoint)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    outcome = bncli("inspect-stats", checkpoint, option, tmp_path / name)
    assert outcome.code == 2
    assert outcome.err.endswith("; give another name\n")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("command", ["compare", "history", "eval"])
def test_other_commands_keep_their_inputs_too(
    bncli: Bncli, finished_run: Path, tmp_path: Path, command: str
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    run = tmp_path / "run"
    words = {
        "compare": [run / "best.pt", run / "last.pt", "--csv", run / "last.pt"],
        "history": [run, "--csv", run / "metrics.jsonl"],
        "eval": [run / "last.pt", "--save", run / "last.pt"],
    }[command]
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert bncli(command, *words).code == 2
    assert {path: path.read_bytes() for path in run.iterdir()} == before
