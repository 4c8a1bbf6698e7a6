import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bncli.batchnorm import compare
from bncli.checkpoints import open_checkpoint
from bncli.cli.plots.heat_map import resample
from bncli.cli.tables.csv_rows import format_csv
from tests.conftest import Bncli


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.fixture
def recalibrated(finished_run: Path, tmp_path: Path) -> Path:
    """The run's checkpoint with other statistics and the same weights."""
    content = torch.load(finished_run / "last.pt", weights_only=True)
    content["state_dict"]["stages.1.0.norm.running_mean"] += 0.5
    content["state_dict"]["stages.1.0.norm.running_var"] *= 2
    torch.save(content, tmp_path / "recalibrated.pt")
    return tmp_path / "recalibrated.pt"


def test_a_checkpoint_against_itself_is_identical(bncli: Bncli, finished_run: Path) -> None:
    outcome = bncli("compare", finished_run / "last.pt", finished_run / "last.pt")
    assert outcome.code == 0
    assert "Identical: all" in outcome.out
    assert "changed" not in outcome.out  # a column and a legend that would say nothing


def test_recalibrated_statistics_are_told_from_training(
    bncli: Bncli, finished_run: Path, recalibrated: Path
) -> None:
    outcome = bncli("compare", finished_run / "last.pt", recalibrated)
    assert outcome.code == 1
    flat = " ".join(outcome.out.split())
    assert "statistics_moved_weights_unchanged: 1 layer (stages.1.0.norm)" in flat
    assert "2 of 14 tensors differ" in flat
    assert all(len(line.rstrip()) <= 80 for line in outcome.out.splitlines()[3:])
    document = bncli("compare", finished_run / "last.pt", recalibrated, "--json").json
    assert document["identical"] is False
    still, moved = document["layers"]
    assert (still["flags"], still["kl"], still["statistics_moved"]) == ([], 0.0, False)
    var = torch.load(finished_run / "last.pt", weights_only=True)["state_dict"]["stages.1.0.norm.running_var"]
    shift = 0.5 / (var.double() + 1e-5).sqrt()
    assert moved["mean_shift_in_first_deviations"] == pytest.approx(
        float(shift.square().mean().sqrt()), rel=1e-5
    )
    assert moved["max_mean_shift_in_first_deviations"] == pytest.approx(float(shift.max()), rel=1e-5)
    assert moved["var_ratio"] == pytest.approx(2, rel=1e-3)
    assert (moved["weights_moved"], moved["feeding_weights_moved"]) == (False, False)


def test_what_was_found_is_in_the_library_s_words_on_the_screen_and_in_json(
    bncli: Bncli, finished_run: Path, recalibrated: Path
) -> None:
    with open_checkpoint(str(finished_run / "last.pt")) as one, open_checkpoint(str(recalibrated)) as two:
        found = compare(one, two)
    document = bncli("compare", finished_run / "last.pt", recalibrated, "--json").json
    assert document["verdict"] == found.verdict
    alone = document["moved_alone"]
    assert (alone["layers"], alone["counters"]) == (["stages.1.0.norm"], "equal")
    assert (alone["first_layer"], alone["first_layer_moved"]) == ("stages.0.0.norm", "not at all")
    flat = " ".join(bncli("compare", finished_run / "last.pt", recalibrated).out.split())
    for text in (found.verdict, *found.moved_alone.known, *found.moved_alone.possible_causes):
        assert text in flat
    other = bncli("compare", finished_run / "last.pt", recalibrated, "--layer", "stages.0.*").out
    assert "Possible causes" not in other  # it is about a layer that is not shown


def test_statistics_that_a_file_records_as_measured_are_said_to_be(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    last, new = finished_run / "last.pt", tmp_path / "new.pt"
    assert bncli("recalibrate", last, "-o", new).code == 0
    assert bncli("compare", last, new, "--json").json["moved_alone"]["counters"] == "measured"
    assert bncli("compare", new, last, "--json").json["moved_alone"]["counters"] == "equal"


def test_a_layer_s_name_cannot_command_the_terminal(bncli: Bncli, tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(3)
    for name in ("a.pt", "b.pt"):
        state = {f"\x1b[31m.{leaf}": tensor.clone() for leaf, tensor in norm.state_dict().items()}
        torch.save(state, tmp_path / name)
        norm(torch.randn(4, 3, 2, 2))
    outcome = bncli("compare", tmp_path / "a.pt", tmp_path / "b.pt")
    assert "statistics_moved_weights_unchanged: 1 layer (\\x1b[31m)" in outcome.out
    assert "\x1b" not in outcome.out


def test_layers_are_sorted_by_how_far_they_moved(
    bncli: Bncli, finished_run: Path, recalibrated: Path
) -> None:
    pair = finished_run / "last.pt", recalibrated
    for by, number in (("model", 0), ("name", 0), ("moved", 1)):
        layers = bncli("compare", *pair, "--sort", by, "--json").json["layers"]
        assert layers[0]["name"] == f"stages.{number}.0.norm"


def test_a_glob_restricts_what_is_shown_not_what_is_judged(
    bncli: Bncli, finished_run: Path, recalibrated: Path
) -> None:
    pair = finished_run / "last.pt", recalibrated
    outcome = bncli("compare", *pair, "--layer", "stages.0.*", "--json")
    assert outcome.code == 1
    assert [layer["name"] for layer in outcome.json["layers"]] == ["stages.0.0.norm"]
    assert outcome.json["num_tensors_changed"] == 2
    assert bncli("compare", *pair, "--layer", "x").code == 2


def test_nothing_in_common_is_refused_on_one_line(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.BatchNorm2d(3)).state_dict(), tmp_path / "other.pt")
    outcome = bncli("compare", finished_run / "last.pt", tmp_path / "other.pt")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "has a counterpart" in outcome.err


@pytest.mark.parametrize("channels", [False, True])
def test_csv_of_one_checkpoint_reads_back_as_the_same_numbers(
    bncli: Bncli, finished_run: Path, tmp_path: Path, channels: bool
) -> None:
    more = ["--channels"] if channels else []
    path = tmp_path / "a.csv"
    last = finished_run / "last.pt"
    assert bncli("inspect-stats", last, "--csv", path, *more).code == 0
    to_stdout = bncli("inspect-stats", last, "--csv", "-", *more)
    assert path.read_bytes() == to_stdout.out.encode()
    assert to_stdout.out.count("\r\n") == to_stdout.out.count("\n")
    layers = bncli("inspect-stats", last, "--json", "--channels").json["layers"]
    found = rows(to_stdout.out)
    if channels:
        expected = [
            (layer["name"], str(channel), *(layer["channels"][name][channel] for name in layer["channels"]))
            for layer in layers
            for channel in range(layer["num_features"])
        ]
        assert [(r["layer"], r["channel"], *map(float, list(r.values())[2:])) for r in found] == expected
    else:
        assert [float(row["running_var_median"]) for row in found] == [
            layer["running_var"]["median"] for layer in layers
        ]
        assert [row["flags"].split() for row in found] == [layer["flags"] for layer in layers]


def test_csv_of_a_comparison_reads_back_as_the_same_numbers(
    bncli: Bncli, finished_run: Path, recalibrated: Path
) -> None:
    pair = finished_run / "last.pt", recalibrated
    outcome = bncli("compare", *pair, "--csv", "-")
    assert outcome.code == 1
    document = bncli("compare", *pair, "--json", "--channels").json
    for row, layer in zip(rows(outcome.out), document["layers"], strict=True):
        for key in ("mean_shift_in_first_deviations", "var_ratio", "max_kl"):
            assert float(row[key]) == layer[key]
        assert (row["layer"], row["weights_moved"]) == (layer["name"], "false")
        assert row["flags"] == " ".join(layer["flags"])
    channels = rows(bncli("compare", *pair, "--csv", "-", "--channels").out)
    kl = [value for layer in document["layers"] for value in layer["channels"]["kl"]]
    assert [float(row["kl"]) for row in channels] == kl


def test_csv_and_json_cannot_share_stdout(bncli: Bncli, finished_run: Path) -> None:
    outcome = bncli("inspect-stats", finished_run / "last.pt", "--csv", "-", "--json")
    assert (outcome.code, outcome.out) == (2, "")
    assert "stdout" in outcome.err
    missing = bncli("inspect-stats", finished_run / "last.pt", "--csv", finished_run / "no" / "a.csv")
    assert (missing.code, missing.out) == (2, "")


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
def test_a_spreadsheet_computes_no_name(name: str) -> None:
    (row,) = rows(format_csv([{"layer": name, "value": -1.5}]))
    assert row == {"layer": "'" + name, "value": "-1.5"}


def test_csv_keeps_what_is_odd(tmp_path: Path) -> None:
    given = {"layer": 'a,"b"\nc\ud800', "nan": math.nan, "inf": -math.inf, "none": None, "third": 1 / 3}
    (row,) = rows(format_csv([given]))
    assert row == {"layer": 'a,"b"\nc\\ud800', "nan": "nan", "inf": "-inf", "none": "", "third": repr(1 / 3)}
    assert format_csv([]) == ""


def test_a_comparison_is_drawn_the_same_each_time(
    bncli: Bncli, finished_run: Path, recalibrated: Path, tmp_path: Path
) -> None:
    paths = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in paths:
        assert bncli("compare", finished_run / "last.pt", recalibrated, "--plot", path).code == 1
    text = paths[0].read_text()
    assert paths[1].read_text() == text
    for expected in ("How far 2 BatchNorm layers moved", "mean shift", "weights unchanged\nKL divergence"):
        assert expected.splitlines()[0] in text


def test_a_heat_map_shows_every_channel_or_the_farthest_of_a_group() -> None:
    few = torch.tensor([1.0, 2.0, math.inf], dtype=torch.float64)
    assert resample(few, 0.0, 6).nan_to_num(-1).tolist() == [1, 1, 2, 2, -1, -1]
    many = torch.tensor([1.0, -5, 2, 0, math.nan, 9, 3, 4], dtype=torch.float64)
    assert resample(many, 0.0, 4).nan_to_num(-1).tolist() == [-5, 2, -1, 4]
    assert resample(many, 4.0, 4).nan_to_num(-1).tolist() == [-5, 0, -1, 3]
    values: Tensor = torch.arange(1000).double()
    assert resample(values, 0.0).shape == (512,)


@pytest.mark.parametrize("place", [None, 0, 2**24, 2**26 + 4321, 80 * 2**20 - 1])
def test_one_flipped_bit_is_found_in_a_tensor_larger_than_what_is_read_at_once(
    bncli: Bncli, tmp_path: Path, place: int | None
) -> None:
    size = 80 * 2**20
    shapes = {"bn.running_mean": (0, 4), "bn.running_var": (16, 4), "big.weight": (32, size // 4)}
    header = {
        name: {"dtype": "F32", "shape": [length], "data_offsets": [start, start + 4 * length]}
        for name, (start, length) in shapes.items()
    }
    text = json.dumps(header).encode()
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text + np.arange(1, 9, dtype="<f4").tobytes())
            start = file.tell()
            if name == "b" and place is not None:
                file.seek(start + place)
                file.write(b"\x10")
            file.truncate(start + size)
    found = bncli("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert found.json["num_tensors_changed"] == (place is not None)
    assert (found.code, found.json["identical"]) == (int(place is not None), place is None)


def test_a_transposed_tensor_equals_the_same_numbers_row_by_row(bncli: Bncli, tmp_path: Path) -> None:
    norm = {f"bn.{name}": value for name, value in nn.BatchNorm2d(3).state_dict().items()}
    weight = torch.randn(7, 5)
    others = weight.clone()
    others[3, 4] += 1
    torch.save(norm | {"w": weight}, tmp_path / "rows.pt")
    for numbers, code in ((weight, 0), (others, 1)):
        torch.save(norm | {"w": numbers.t().contiguous().t()}, tmp_path / "columns.pt")
        assert bncli("compare", tmp_path / "rows.pt", tmp_path / "columns.pt").code == code


def test_several_ranks_are_pooled_and_what_averaging_loses_is_told(
    bncli: Bncli, finished_run: Path, recalibrated: Path
) -> None:
    first = finished_run / "last.pt"
    outcome = bncli("compare", "--ranks", first, recalibrated, first, "--values-per-channel", 100)
    assert outcome.code == 1
    assert all(len(line.rstrip()) <= 80 for line in outcome.out.splitlines()[3:])
    flat = " ".join(outcome.out.split())
    assert "The running statistics of the 3 ranks differ in 1 of 2 layers: means by up to" in flat
    assert "Averaging variances would lose up to" in flat
    document = bncli("compare", "--ranks", first, recalibrated, first, "--channels", "--json").json
    still, moved = document["layers"]
    assert (still["identical"], moved["identical"]) == (True, False)
    state = torch.load(first, weights_only=True)["state_dict"]
    var = state["stages.1.0.norm.running_var"].double()
    pooled = var * 4 / 3 + 0.5**2 * 2 / 9  # of three means, one of them 0.5 away
    np.testing.assert_allclose(moved["channels"]["running_var"], pooled, rtol=1e-6)
    np.testing.assert_allclose(moved["channels"]["averaged_var"], var * 4 / 3, rtol=1e-6)
    table = bncli("compare", "--ranks", first, recalibrated, "--channels", "--csv", "-")
    assert len(rows(table.out)) == sum(layer["num_features"] for layer in document["layers"])
    same = bncli("compare", "--ranks", first, first)
    assert same.code == 0 and "All 2 ranks hold the same running statistics" in same.out


def test_more_than_two_files_are_those_of_ranks_and_nothing_else(bncli: Bncli, finished_run: Path) -> None:
    path = finished_run / "last.pt"
    for arguments, expected in (
        ((path, path, path), "3 checkpoints: only with --ranks"),
        ((path, path, "--values-per-channel", 9), "--values-per-channel: only with --ranks"),
        ((path, path, "--ranks", "--plot", "a.png"), "--plot: no effect here; leave it out"),
    ):
        outcome = bncli("compare", *arguments)
        assert outcome.code == 2 and expected in outcome.err
    outcome = bncli("inspect-stats", path, path)
    assert outcome.code == 2 and "bncli compare --ranks" in outcome.err
