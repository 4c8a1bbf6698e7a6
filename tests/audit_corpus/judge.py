"""What `bncli inspect-stats` says of a case, and whether that is right."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.audit_corpus.case import REFUSED, Case
from tests.audit_corpus.observed import Observed, read_observed
from tests.audit_corpus.program import call, comparing

FALSE_ERROR, MISS, FALSE_WARNING = "FALSE ERROR", "MISS", "false warning"
EXPECTED_MISS, OK = "expected miss", "ok"


@dataclass(frozen=True)
class Said:
    """One code, and in how many layers it was found."""

    code: str
    severity: str
    layers: tuple[str, ...]


@dataclass
class Verdict:
    """A case judged. Codes are written as "BN005 x3" where three layers have them."""

    name: str
    what: str
    kind: str
    files: list[str]
    expected: list[str]
    exit_code: int
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    infos: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)  # warnings that the network's activations show to be true
    false_errors: list[str] = field(default_factory=list)
    false_warnings: list[str] = field(default_factory=list)
    blind: str = ""
    distance: float | None = None  # of the statistics from the true ones, in deviations, median of layers
    message: str = ""
    verdict: str = OK


def ask(case: Case, folder: Path) -> tuple[int, Any, str]:
    """Exit code, JSON document (None where there is none) and stderr of the command line."""
    paths = case.paths(folder)
    told = call(comparing() if len(paths) == 2 else "inspect-stats", *paths, "--json")
    return told.code, json.loads(told.out) if told.out.strip() else None, told.err


def judge(case: Case, folder: Path) -> Verdict:
    """Ask, and compare with what is true."""
    code, document, message = ask(case, folder)
    observed = read_observed(case.paths(folder)[0])
    verdict = Verdict(
        name=case.name,
        what=case.what,
        kind=case.name.partition("/")[0],
        files=[path.relative_to(folder).as_posix() for path in case.paths(folder)],
        expected=sorted(case.expected) or ["nothing"],
        exit_code=code,
        blind=case.blind,
        distance=None if observed is None else observed.median_distance,
        message=message,
    )
    said = _findings(code, document)
    for severity, column in (
        ("error", verdict.errors),
        ("warning", verdict.warnings),
        ("info", verdict.infos),
    ):
        column += [_counted(one) for one in said if one.severity == severity]
    for one in said:
        _sort_out(one, case, observed, verdict)
    named = any(one.code in case.expected and one.severity in case.accepted for one in said)
    verdict.verdict = _verdict(case, verdict, named=named)
    return verdict


def _findings(code: int, document: Any) -> list[Said]:
    """Of an audit its findings, of a comparison its flags: a flag has no severity and is loud."""
    if code == 2 or document is None:
        return [Said(REFUSED, "error", ())]
    if "findings" in document:
        pairs = [((one["code"], one["severity"]), one["layer"]) for one in document["findings"]]
    else:
        pairs = [((flag, "warning"), row["name"]) for row in document["layers"] for flag in _flags(row)]
    layers: dict[tuple[str, str], list[str]] = {}
    for key, layer in pairs:
        layers.setdefault(key, []).append(layer)
    return [Said(code, severity, tuple(names)) for (code, severity), names in sorted(layers.items())]


def _flags(row: dict[str, Any]) -> Iterable[str]:
    yield from row["flags"]
    if row["hyperparameters_changed"]:
        yield "hyperparameters_changed"


def _counted(said: Said) -> str:
    return said.code if len(said.layers) < 2 else f"{said.code} x{len(said.layers)}"


def _sort_out(said: Said, case: Case, observed: Observed | None, verdict: Verdict) -> None:
    """Into false errors, false warnings and facts; what names the illness is none of them."""
    if said.severity == "info" or said.code in case.expected:
        return
    if said.severity == "error":
        verdict.false_errors.append(_counted(said))
        return
    seen = set(observed.facts.get(said.code, ())) if observed else set()
    untrue = [] if said.code in case.facts else [layer for layer in said.layers if layer not in seen]
    if untrue:
        verdict.false_warnings.append(_counted(Said(said.code, said.severity, tuple(untrue))))
    if len(untrue) < len(said.layers):
        true = tuple(layer for layer in said.layers if layer not in untrue)
        verdict.facts.append(_counted(Said(said.code, said.severity, true)))


def _verdict(case: Case, verdict: Verdict, *, named: bool) -> str:
    """The worst of what can be said."""
    if verdict.false_errors:
        return FALSE_ERROR
    if not case.healthy and not named and not case.blind:
        return MISS
    if verdict.false_warnings:
        return FALSE_WARNING
    return OK if case.healthy or named else EXPECTED_MISS
