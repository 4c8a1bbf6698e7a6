"""What the audit found, and the pages of `--explain`: text for people."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console

from bncli.batchnorm import Finding, Rule
from bncli.cli.messages import one_line
from bncli.cli.tables.table import console_for_results

MAX_MESSAGES = 5  # layers of one rule that get a line each; more of them are named in one paragraph
MAX_NAMES = 20
SEVERITIES = ("error", "warning", "info")  # the gravest first


def show_findings(
    console: Console, findings: Sequence[Finding], *, num_rules: int, everything: bool, infos: bool = False
) -> None:
    """Findings by rule: a heading, the layers with their numbers, and what to do.

    Infos are summed up in one line, unless `infos` or `everything` asks for them.
    """
    whole = everything or infos
    shown = [finding for finding in findings if whole or finding.severity != "info"]
    for _, group in groupby(shown, key=lambda finding: finding.code):
        by_severity = sorted(group, key=lambda finding: SEVERITIES.index(finding.severity))
        for _, alike in groupby(by_severity, key=lambda finding: finding.severity):
            _show_rule(console, list(alike), everything=everything)
    number = Counter(finding.severity for finding in findings)
    if not findings:
        console.print(f"No findings: {_plural(num_rules, 'rule')} checked.")
        return
    counts = f"{_plural(number['error'], 'error')}, {_plural(number['warning'], 'warning')}"
    if not number["error"] + number["warning"]:
        counts = f"No errors or warnings: {_plural(num_rules, 'rule')} checked"
    if number["info"]:
        _say(console, _sum_up_infos(findings, shown=whole))
    _say(console, f"{counts}. bncli inspect-stats --explain CODE tells why, and who says so.")


def _sum_up_infos(findings: Sequence[Finding], *, shown: bool) -> str:
    """One line on the findings that are facts or open questions."""
    infos = [finding for finding in findings if finding.severity == "info"]
    number = Counter(finding.name for finding in infos)
    names = ", ".join(f"{name} {count:,}" for name, count in number.items())
    layers = _plural(len({finding.layer for finding in infos}), "layer")
    return f"{_plural(len(infos), 'note')} in {layers}: {names}" + ("." if shown else "; --all shows them.")


def _show_rule(console: Console, findings: Sequence[Finding], *, everything: bool) -> None:
    first = findings[0]
    style = {"error": "bold red", "warning": "bold yellow", "info": "bold"}[first.severity]
    where = one_line(first.layer) if len(findings) == 1 else _plural(len(findings), "layer")
    _say(console, f"{first.code} {first.name} ({first.severity}): {where}", style=style)
    if everything or len(findings) <= MAX_MESSAGES:
        for finding in findings:
            name = "" if len(findings) == 1 else f"{one_line(finding.layer)}: "
            _say(console, f"{name}{finding.message}", indent=2)
    else:
        names = ", ".join(one_line(finding.layer) for finding in findings[:MAX_NAMES])
        more = f", and {len(findings) - MAX_NAMES:,} more (--all)" if len(findings) > MAX_NAMES else ""
        _say(console, names + more, indent=2)
        _say(console, f"the first: {first.message}", indent=2)
    for advice in dict.fromkeys(finding.advice for finding in findings):
        _say(console, advice, indent=2)
    console.print()


def show_explanation(rules: Sequence[Rule]) -> None:
    """A page for every rule."""
    console = console_for_results()
    for number, rule in enumerate(rules):
        if number:
            console.print()
        _say(console, f"{rule.code} {rule.name} ({rule.severity})", style="bold")
        _say(console, _plain(f"Finds {rule.summary}."))
        console.print()
        _say(console, rule.theory)
        console.print()
        _say(console, f"What it can know: {rule.can_know}")
        console.print()
        _say(console, f"What it cannot know: {rule.cannot_know}")
        console.print()
        _say(console, f"What to do: {_plain(rule.advice)}")
        for threshold in rule.thresholds:
            option = f"--threshold {threshold.name}={threshold.default:.6g}"
            _say(console, f"{option} ({threshold.meaning}): {threshold.reason}.")
        _say(console, f"Source: {rule.source}.")


def _plain(text: str) -> str:
    return text.replace("`", "")


def _say(console: Console, text: str, *, indent: int = 0, style: str | None = None) -> None:
    """Whole words on lines that fit; off a terminal too, up to 80 columns."""
    width = max(min(console.width, 80), indent + 10)
    space = " " * indent
    lines = textwrap.wrap(text, width, initial_indent=space, subsequent_indent=space, break_on_hyphens=False)
    console.print("\n".join(lines), style=style)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
