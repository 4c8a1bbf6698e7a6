"""The verdicts as a table, as sums and as one JSON document."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tests.audit_corpus.judge import EXPECTED_MISS, MISS, Verdict

COLUMNS = ("case", "expected", "errors", "warnings", "infos", "exit", "verdict")


def summarize(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Counts of cases."""
    return {
        "num_cases": len(verdicts),
        "num_healthy": sum(one.kind == "healthy" for one in verdicts),
        "num_ill": sum(one.kind == "ill" for one in verdicts),
        "num_false_errors": sum(bool(one.false_errors) for one in verdicts),
        "num_false_warnings": sum(bool(one.false_warnings) for one in verdicts),
        "num_misses": sum(one.verdict == MISS for one in verdicts),
        "num_expected_misses": sum(one.verdict == EXPECTED_MISS for one in verdicts),
        "num_cases_with_facts": sum(bool(one.facts) for one in verdicts),
    }


def as_json(verdicts: Sequence[Verdict]) -> str:
    """One document."""
    document: dict[str, Any] = {**summarize(verdicts), "cases": [asdict(one) for one in verdicts]}
    return json.dumps(document, indent=1)


def as_text(verdicts: Sequence[Verdict]) -> str:
    """A row per case, then what is wrong, then true facts, then the sums."""
    rows = [
        (
            one.name,
            " or ".join(one.expected),
            " ".join(one.errors),
            " ".join(one.warnings),
            " ".join(one.infos),
            str(one.exit_code),
            one.verdict,
        )
        for one in verdicts
    ]
    lines = _table(COLUMNS, rows)
    wrong = [
        (one.name, kind, ", ".join(codes), one.what)
        for one in verdicts
        for kind, codes in (
            ("false error", one.false_errors),
            ("false warning", one.false_warnings),
            ("miss", one.expected if one.verdict == MISS else []),
        )
        if codes
    ]
    lines += ["", "False alarms and misses", *_table(("case", "which", "codes", "what it is"), wrong)]
    blind = [
        (one.name, ", ".join(one.expected), one.blind) for one in verdicts if one.verdict == EXPECTED_MISS
    ]
    lines += ["", "Misses that are expected", *_table(("case", "codes", "why"), blind)]
    facts = [(one.name, ", ".join(one.facts)) for one in verdicts if one.facts]
    lines += ["", "Warnings that are facts about the network", *_table(("case", "codes"), facts), ""]
    lines += [
        f"{name.removeprefix('num_').replace('_', ' '):18} {n}" for name, n in summarize(verdicts).items()
    ]
    return "\n".join(line.rstrip() for line in lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (heads, *rows)
    ]
    return [lines[0], "-" * len(lines[0].rstrip()), *lines[1:]]
