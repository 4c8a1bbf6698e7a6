"""The audit against networks whose state is known: no false alarm, and no miss of what a file can show."""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.audit_corpus.__main__ import main
from tests.audit_corpus.case import Case
from tests.audit_corpus.corpus import all_cases, run
from tests.audit_corpus.judge import EXPECTED_MISS, FALSE_ERROR, FALSE_WARNING, MISS, OK, judge
from tests.audit_corpus.observed import observe, read_observed, write_observed
from tests.audit_corpus.table import as_text, summarize

CASES = {case.name: case for case in all_cases()}
# they need no trained network; the issue's own four are among them
QUICK = (
    "healthy/issue-f1",
    "healthy/issue-f3",
    "healthy/unit-filters",
    "healthy/unit-norm-after-norm",
    "healthy/unit-orthogonal-0.1",
    "healthy/unit-standardised",
    "healthy/sound",
    "healthy/video",
    "healthy/generator",
    "ill/issue-f2",
    "ill/issue-f4",
    "ill/momentum-1",
    "ill/fresh",
    "ill/short-3",
    "ill/small-input",
    "ill/offset-input",
)
# warnings that the network's own activations, or the case's history, show to be true
FACTS = {"BN001", "BN002", "BN005", "BN006", "BN007", "BN008", "BN010", "BN011", "hyperparameters_changed"}
BLIND = {
    "ill/readme-batches_of_2",
    "ill/readme-averaged_weights",
    "ill/swa-stale",
    "ill/mnasnet0_5-wild",
    "ill/keras-0.99-state",
    "ill/bfloat16-stuck",
    "ill/other-eps",
}


@pytest.mark.parametrize("name", QUICK)
def test_a_cheap_case_gets_the_right_verdict(name: str, tmp_path: Path) -> None:
    (verdict,) = run([CASES[name]], tmp_path)
    assert verdict.verdict == OK, verdict


@pytest.mark.slow
def test_over_the_whole_corpus_there_is_no_false_alarm_and_no_miss_but_the_blind_ones(tmp_path: Path) -> None:
    verdicts = run(list(CASES.values()), tmp_path)
    sums = summarize(verdicts)
    found = {name: sums[f"num_{name}"] for name in ("false_errors", "false_warnings", "misses")}
    assert found == {"false_errors": 0, "false_warnings": 0, "misses": 0}, as_text(verdicts)
    assert {one.name for one in verdicts if one.verdict == EXPECTED_MISS} <= BLIND
    assert {code.partition(" ")[0] for one in verdicts for code in one.facts} <= FACTS
    # what is called healthy is: its statistics are near those of its activations
    by_design = ("absorbed", "frozen-layers-absorbed", "trained-in-eval-mode")
    for one in verdicts:
        if one.kind == "healthy" and one.distance is not None and not one.name[8:].startswith(by_design):
            assert one.distance < 2, one.name


def test_names_are_unique_and_every_rule_has_an_ill_network() -> None:
    assert len(CASES) == len(all_cases())
    named = {code for case in CASES.values() for code in case.expected}
    assert {f"BN{number:03}" for number in range(1, 16)} <= named
    assert {case.name for case in CASES.values() if case.blind} == BLIND


def saved(change: Callable[[nn.BatchNorm1d], None]) -> Callable[[Path], None]:
    def make(stem: Path) -> None:
        model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        for _ in range(60):
            model(torch.randn(16, 4))
        change(model[1])
        torch.save(model.state_dict(), stem.with_name(f"{stem.name}.pt"))

    return make


def nothing(_: nn.BatchNorm1d) -> None:
    pass


def with_nan(layer: nn.BatchNorm1d) -> None:
    layer.running_mean[2] = torch.nan


def with_offset(layer: nn.BatchNorm1d) -> None:
    layer.running_mean[2] = 1000.0


@pytest.mark.parametrize(
    ("change", "options", "verdict"),
    [
        (nothing, {}, OK),
        (with_nan, {}, FALSE_ERROR),
        (with_nan, {"facts": frozenset({"BN003"})}, FALSE_ERROR),
        (with_nan, {"expected": frozenset({"BN003"})}, OK),
        (with_nan, {"expected": frozenset({"BN003"}), "accepted": frozenset({"warning"})}, MISS),
        (with_nan, {"expected": frozenset({"BN004"})}, FALSE_ERROR),
        (nothing, {"expected": frozenset({"BN003"})}, MISS),
        (nothing, {"expected": frozenset({"BN003"}), "blind": "why"}, EXPECTED_MISS),
    ],
)
def test_the_judge_tells_false_alarms_from_misses(
    change: Callable[[nn.BatchNorm1d], None], options: dict[str, object], verdict: str, tmp_path: Path
) -> None:
    case = Case("healthy/x", "x", saved(change), **options)  # type: ignore[arg-type]
    assert run([case], tmp_path)[0].verdict == verdict


def test_a_warning_is_false_until_the_activations_or_the_history_show_that_it_is_true(tmp_path: Path) -> None:
    case = Case("healthy/x", "x", saved(with_offset))
    told = run([case], tmp_path)[0]
    assert told.verdict == FALSE_WARNING
    assert judge(replace(case, facts=frozenset({"BN012"})), tmp_path).verdict == OK
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model.load_state_dict(torch.load(tmp_path / "healthy/x.pt"))
    for offset, verdict in ((0.0, FALSE_WARNING), (1000.0, OK)):
        model[0].bias.data[2] = offset  # what the second layer really sees
        write_observed(observe(model, [torch.randn(64, 4)]), tmp_path / "healthy/x.pt")
        seen = judge(case, tmp_path)
        assert (seen.verdict, seen.facts) == (verdict, ["BN012"] if verdict == OK else [])


def test_what_is_observed_is_what_float64_says_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    with torch.no_grad():
        model[0].weight[1] = 0  # dead: its input is constant
        model[1].bias[2] = -50  # never above 0
        model[1].weight[3] = 1e4
        model[1].running_mean.copy_(torch.randn(5))
        model[1].running_var.copy_(torch.rand(5) + 0.5)
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(40, 3) for _ in range(3)]
    found = observe(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    values = torch.cat([model[0](batch) for batch in batches]).detach().double()
    mean, var = values.mean(0), values.var(0, unbiased=False)
    shift = (before["1.running_mean"] - mean) / (var + 1e-5).sqrt()
    ratio = ((before["1.running_var"] + 1e-5) / (var + 1e-5)).log()
    assert found.largest_distance == pytest.approx(float((shift**2 + ratio**2).mean().sqrt()), rel=1e-6)
    assert found.facts == {"BN005": ["1"], "BN006": ["1"], "BN007": ["1"], "BN008": ["1"], "BN012": ["1"]}
    write_observed(found, tmp_path / "x.pt")
    assert read_observed(tmp_path / "x.pt") == found


def test_files_that_lie_there_are_judged_and_not_made_again(tmp_path: Path) -> None:
    case = CASES["healthy/issue-f3"]
    run([case], tmp_path)
    before = (tmp_path / "healthy/issue-f3.pt").stat()

    def fail(_: Path) -> None:
        raise AssertionError

    run([replace(case, make=fail)], tmp_path)
    assert (tmp_path / "healthy/issue-f3.pt").stat() == before


@pytest.mark.parametrize("name", ["healthy/issue-f3", "ill/short-3"])
def test_a_case_is_the_same_whatever_was_made_before_it(name: str, tmp_path: Path) -> None:
    alone, after = tmp_path / "alone", tmp_path / "after"
    run([CASES[name]], alone)
    torch.manual_seed(5)
    run([CASES["ill/issue-f4"], CASES[name]], after)
    first, second = (torch.load(folder / f"{name}.pt") for folder in (alone, after))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_program_prints_one_document_and_exits_with_1_on_a_miss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["audit_corpus", "--out", str(tmp_path), "--json", "--only"]
    monkeypatch.setattr(sys, "argv", [*arguments, "ill/nan"])
    stem = tmp_path / "ill" / "nan"
    stem.parent.mkdir()
    saved(nothing)(stem)
    assert main() == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["num_cases"], document["num_misses"]) == (1, 1)
    saved(with_nan)(stem)
    assert main() == 0
    assert json.loads(capsys.readouterr().out)["cases"][0]["errors"] == ["BN003"]
