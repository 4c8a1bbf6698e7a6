"""The verdicts as a table, as sums and as one JSON document."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tests.audit_corpus.judge import EXPECTED_MISS, MISS, Verdict

WIDTH = 80
COLUMNS = ("case", "exit", "verdict")


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
    """A row per case, with what was expected and found; then what is wrong, true facts, and the sums."""
    heads, *rows = _table(
        COLUMNS,
        [(one.name, str(one.exit_code), one.verdict) for one in verdicts],
    )
    lines = [heads, "-" * WIDTH]
    for one, row in zip(verdicts, rows, strict=True):
        expected = [] if one.kind == "healthy" else [f"expected {' or '.join(one.expected)}"]
        said = {"errors": one.errors, "warnings": one.warnings, "infos": one.infos}
        found = [f"{kind} {', '.join(codes)}" for kind, codes in said.items() if codes]
        lines += [row, *_paragraph("", *expected, *found)]
    lines += ["", "False alarms and misses"]
    for one in verdicts:
        for kind, codes in (
            ("false error", one.false_errors),
            ("false warning", one.false_warnings),
            ("miss", one.expected if one.verdict == MISS else []),
        ):
            if codes:
                lines += _paragraph(one.name, f"{kind} {', '.join(codes)}", one.what)
    lines += ["", "Misses that are expected"]
    for one in verdicts:
        if one.verdict == EXPECTED_MISS:
            lines += _paragraph(one.name, ", ".join(one.expected), one.blind)
    lines += ["", "Warnings that are facts about the network"]
    for one in verdicts:
        if one.facts:
            lines += _paragraph(one.name, ", ".join(one.facts))
    lines.append("")
    lines += [
        f"{name.removeprefix('num_').replace('_', ' '):18} {n}" for name, n in summarize(verdicts).items()
    ]
    return "\n".join(line.rstrip() for line in lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (heads, *rows)
    ]


def _paragraph(name: str, *parts: str) -> list[str]:
    """The name, and what there is to say, indented below it or beside it."""
    text = "; ".join(parts)
    indent = " " * 4
    if name:
        return textwrap.wrap(f"{name}: {text}", WIDTH, subsequent_indent=indent)
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
