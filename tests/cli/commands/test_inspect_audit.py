"""The linter's command line: which findings it shows, and how it exits."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bncli.batchnorm import RULES
from tests.conftest import Bncli

Save = Callable[[str], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write the state dict of a network of two layers: healthy, or with an info, a warning, or all three."""

    def write(kind: str) -> Path:
        model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        for _ in range(50):
            model(torch.randn(16, 4))
        state = model.state_dict()
        if kind in ("info", "error"):
            state["0.weight"][1] = 0.0
        if kind in ("warning", "error"):
            state["0.running_mean"][0] = 100.0
        if kind == "error":
            state["1.running_var"][2] = -3.0
        torch.save(state, tmp_path / f"{kind}.pt")
        return tmp_path / f"{kind}.pt"

    return write


@pytest.mark.parametrize(
    ("kind", "options", "code"),
    [
        ("healthy", (), 0),
        ("healthy", ("--fail-on", "warning"), 0),
        ("warning", (), 0),
        ("warning", ("--fail-on", "error"), 0),
        ("warning", ("--fail-on", "warning"), 1),
        ("info", (), 0),
        ("info", ("--fail-on", "warning"), 0),
        ("info", ("--fail-on", "warning", "--select", "BN006"), 0),
        ("warning", ("--fail-on", "warning", "--ignore", "BN012"), 0),
        ("warning", ("--fail-on", "warning", "--select", "BN004"), 0),
        ("warning", ("--fail-on", "warning", "--layer", "1"), 0),
        ("error", (), 1),
        ("error", ("--fail-on", "never"), 0),
        ("error", ("--fail-on", "warning"), 1),
        ("error", ("--fail-on", "warning", "--select", "BN004"), 1),
        ("error", ("--ignore", "negative_variance"), 0),
        ("error", ("--select", "BN012,bn004"), 1),
        ("error", ("--layer", "0"), 0),
    ],
)
@pytest.mark.parametrize("form", [(), ("--json",), ("--channels",)])
def test_the_exit_code_follows_the_findings_that_are_left(
    bncli: Bncli, save: Save, kind: str, options: tuple[str, ...], code: int, form: tuple[str, ...]
) -> None:
    outcome = bncli("inspect-stats", save(kind), *options, *form)
    assert (outcome.code, outcome.err) == (code, "")


def test_json_has_the_findings_with_their_numbers(bncli: Bncli, save: Save) -> None:
    result = bncli("inspect-stats", save("error"), "--json").json
    assert (result["num_errors"], result["num_warnings"], result["num_infos"]) == (1, 1, 1)
    first, second, third = result["findings"]
    assert [found["severity"] for found in (first, second, third)] == ["error", "info", "warning"]
    assert first == {
        "code": "BN004",
        "name": "negative_variance",
        "severity": "error",
        "layer": "1",
        "channels": [2],
        "values": {"running_var": -3.0},
        "thresholds": {},
        "message": "channel 2 of 4: running_var is -3",
        "advice": next(rule.advice for rule in RULES if rule.code == "BN004"),
    }
    assert (second["code"], second["thresholds"]) == ("BN006", {"dead_variance": 0.01})
    assert second["values"] == {
        "num_zero_weights": 1,
        "running_var": pytest.approx(1.0, abs=0.5),
        "eps": 1e-5,
        "eps_assumed": True,
    }
    assert [layer["flags"] for layer in result["layers"]] == [
        ["dead_channel", "far_mean"],
        ["negative_variance"],
    ]
    assert [layer["dead_channels"] for layer in result["layers"]] == [[1], []]


@pytest.mark.parametrize(
    ("options", "expected", "drawn_names"),
    [
        # dead_channel is an info there: in the plot only where it is asked for
        ((), ["dead_channel far_mean", "negative_variance"], {"far_mean", "negative_variance"}),
        (("--ignore", "BN006,BN012"), ["", "negative_variance"], {"negative_variance"}),
        (("--select", "BN006"), ["dead_channel", ""], {"dead_channel"}),
        (
            ("--select", "BN012", "--threshold", "mean_in_deviations=0"),
            ["far_mean", "far_mean"],
            {"far_mean"},
        ),
    ],
)
def test_csv_and_plot_and_json_say_the_same(
    bncli: Bncli,
    save: Save,
    tmp_path: Path,
    options: tuple[str, ...],
    expected: list[str],
    drawn_names: set[str],
) -> None:
    source = save("error")
    rows = csv.DictReader(bncli("inspect-stats", source, "--csv", "-", *options).out.splitlines())
    assert [row["flags"] for row in rows] == expected
    result = bncli("inspect-stats", source, "--json", *options).json
    assert [" ".join(layer["flags"]) for layer in result["layers"]] == expected
    assert [layer["dead_channels"] for layer in result["layers"]] == [[1], []]  # a fact, whatever is asked
    bncli("inspect-stats", source, "--plot", str(tmp_path / "a.svg"), *options)
    drawn = (tmp_path / "a.svg").read_text()
    for name in ("dead_channel", "negative_variance", "far_mean"):
        assert (f"<!-- {name} " in drawn or f"<!-- {name}\n" in drawn) == (name in drawn_names)


def test_the_channels_view_names_the_rules_of_each_channel(bncli: Bncli, save: Save) -> None:
    out = bncli("inspect-stats", save("error"), "--channels").out
    marked = [line.split() for line in out.splitlines() if re.search(r"^ +\d.*BN\d+$", line)]
    assert [(words[0], words[-1]) for words in marked] == [("0", "BN012"), ("1", "BN006"), ("2", "BN004")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--select", "BN099"), "BN001 never_updated"),
        (("--ignore", "nothing"), "BN001 never_updated"),
        (("--explain", "nothing"), "BN001 never_updated"),
        (("--threshold", "gian=3"), "gain_per_median"),
        (("--threshold", "gain"), "NAME=NUMBER"),
        (("--threshold", "gain=nan"), "0 or more"),
        (("--fail-on", "info"), "'info' is not one of"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_list(
    bncli: Bncli, save: Save, options: tuple[str, ...], message: str
) -> None:
    outcome = bncli("inspect-stats", save("healthy"), *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_infos_are_one_line_until_they_are_asked_for(bncli: Bncli, save: Save) -> None:
    source = save("info")
    short = bncli("inspect-stats", source).out
    assert "1 note in 1 layer: dead_channel 1; --all shows them." in short
    assert "No errors or warnings: 15 rules checked." in short
    assert "BN006" not in short
    for options in (("--all",), ("--select", "dead_channel")):
        shown = bncli("inspect-stats", source, *options).out
        assert "BN006 dead_channel (info): 0\n  channel 1 of 4: weight is 0." in shown
        assert "1 note in 1 layer: dead_channel 1." in shown
    everything = bncli("inspect-stats", save("error")).out
    assert "1 note in 1 layer: dead_channel 1; --all shows them." in everything
    assert "1 error, 1 warning." in everything


def test_without_a_checkpoint_there_is_only_explain(bncli: Bncli) -> None:
    assert bncli("inspect-stats").code == 2
    assert bncli("inspect-stats", "--explain", "BN003").code == 0


def test_a_threshold_changes_what_is_found(bncli: Bncli, save: Save) -> None:
    strict = ("--threshold", "mean_in_deviations=0", "--threshold", "residue=0", "--select", "BN012,BN002")
    result = bncli("inspect-stats", save("healthy"), "--json", *strict).json
    assert {finding["code"] for finding in result["findings"]} == {"BN002", "BN012"}


def test_all_rules_are_explained_by_all_and_in_json(bncli: Bncli) -> None:
    text = bncli("inspect-stats", "--explain", "all").out
    assert re.findall(r"^(BN\d+) ", text, flags=re.MULTILINE) == [f"BN{n:03}" for n in range(1, 16)]
    rules = bncli("inspect-stats", "--explain", "all", "--json").json["rules"]
    for shown, rule in zip(rules, RULES, strict=True):
        for part in ("code", "severity", "theory", "can_know", "cannot_know", "source"):
            assert shown[part] == getattr(rule, part)


def test_layers_are_sorted_worst_first(bncli: Bncli, tmp_path: Path) -> None:
    state = {}
    for name, mean, var in (("b", 1.0, 4.0), ("c", 0.0, 1.1), ("a", -9.0, 9.0), ("d", 0.5, -1.0)):
        state |= {
            f"{name}.running_mean": torch.tensor([mean, 0.0]),
            f"{name}.running_var": torch.tensor([var, 2.0]),
        }
    torch.save(state, tmp_path / "x.pt")

    def order(by: str) -> str:
        result = bncli("inspect-stats", tmp_path / "x.pt", "--json", "--sort", by).json
        return "".join(layer["name"] for layer in result["layers"])

    assert order("model") == "bcad"
    assert order("name") == "abcd"
    assert order("findings") == "dbca"
    assert order("gain") == "cbad"
    assert order("mean") == "abcd"
    assert order("variance") == "dcba"


def many(path: Path, number: int, *, fresh: bool) -> Path:
    norm = nn.BatchNorm1d(2)
    for _ in range(0 if fresh else 50):
        norm(torch.randn(8, 2))
    state = {f"layers.{n}.{key}": value for n in range(number) for key, value in norm.state_dict().items()}
    if not fresh:
        state[f"layers.{number - 1}.running_var"] = torch.tensor([-1.0, 1.0])
    torch.save(state, path)
    return path


def test_many_layers_with_one_fault_are_one_finding(bncli: Bncli, tmp_path: Path) -> None:
    path = many(tmp_path / "fresh.pt", 90, fresh=True)
    out = bncli("inspect-stats", path).out
    assert "BN001 never_updated (warning): 90 layers\n  layers.0, layers.1," in out
    assert "and 70 more (--all)" in " ".join(out.split())
    assert "0 errors, 90 warnings." in out
    assert len(out.split("\n\n", 1)[1].splitlines()) < 14
    every = bncli("inspect-stats", path, "--all").out
    assert "layers.89: running_mean is 0" in " ".join(every.split())


def test_of_very_many_layers_those_with_findings_are_shown(bncli: Bncli, tmp_path: Path) -> None:
    path = many(tmp_path / "many.pt", 300, fresh=False)
    out = bncli("inspect-stats", path).out
    rows = [line.split()[0] for line in out.splitlines() if re.match(r"layers\.\d+ ", line)]
    assert (rows[0], len(rows)) == ("layers.299", 200)
    assert "200 of 300 layers, those with findings first; --all shows all." in out
    every = bncli("inspect-stats", path, "--all").out
    assert len(re.findall(r"^layers\.\d+ ", every, flags=re.MULTILINE)) == 300
    assert len(bncli("inspect-stats", path, "--json").json["layers"]) == 300


@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_a_narrow_terminal_folds_names_and_keeps_numbers(
    bncli: Bncli, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    from rich.console import Console

    import bncli.cli.tables.inspect_stats as render

    monkeypatch.setattr(
        render, "console_for_results", lambda: Console(highlight=False, markup=False, width=width)
    )
    state = {f"a.very.long.name.of.a.layer.{k}": v for k, v in torch.load(save("error")).items()}
    torch.save(state, tmp_path / "long.pt")
    out = bncli("inspect-stats", tmp_path / "long.pt").out
    assert all(len(line) <= max(width, 34) for line in out.splitlines())
    assert re.search(r"-3\s+[\d.]+\s+[\d.]+", out)


def test_names_from_a_file_cannot_command_the_terminal(bncli: Bncli, tmp_path: Path) -> None:
    torch.save({f"\x1b[31m.{k}": v for k, v in nn.BatchNorm1d(2).state_dict().items()}, tmp_path / "x.pt")
    outcome = bncli("inspect-stats", tmp_path / "x.pt", "--fail-on", "warning")
    assert outcome.code == 1
    assert "\x1b" not in outcome.out
