import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import Bncli, save_as_if_whole


def test_inspect_stats_keeps_its_contract(bncli: Bncli, finished_run: Path) -> None:
    outcome = bncli("inspect-stats", finished_run / "last.pt", "--json")
    assert outcome.code == 0
    result = outcome.json
    state = torch.load(finished_run / "last.pt", weights_only=True)["state_dict"]
    assert result["num_layers"] == 2
    for layer in result["layers"]:
        assert layer["num_batches_tracked"] == 20
        assert (layer["momentum"], layer["eps"], layer["flags"]) == (0.1, 1e-5, [])
        for which in ("running_mean", "running_var", "weight", "bias"):
            values = state[f"{layer['name']}.{which}"].tolist()
            assert len(values) == layer["num_features"]
            assert layer[which] == {
                "min": min(values),
                "median": pytest.approx(statistics.median(values)),
                "max": max(values),
            }


def test_every_layer_has_a_row_and_a_healthy_network_no_flag(bncli: Bncli, finished_run: Path) -> None:
    outcome = bncli("inspect-stats", finished_run / "last.pt")
    rows = [line for line in outcome.out.splitlines() if line.startswith("stages.")]
    assert [row.split()[:2] for row in rows] == [["stages.0.0.norm", "8"], ["stages.1.0.norm", "16"]]
    assert "num_batches_tracked 20, momentum 0.1, eps 1e-05" in outcome.out
    assert "Flags: none" in outcome.out


def test_a_glob_selects_layers_and_channels_are_shown_one_by_one(bncli: Bncli, finished_run: Path) -> None:
    outcome = bncli("inspect-stats", finished_run / "last.pt", "--layer", "*.1.*", "--channels")
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
    layers = bncli("inspect-stats", tmp_path / "bad.pt", "--json").json["layers"]
    assert [layer["flags"] for layer in layers] == [[], [flag]]
    assert f"stages.1.0.norm: {flag}" in bncli("inspect-stats", tmp_path / "bad.pt").out


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
