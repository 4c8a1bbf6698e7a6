"""What the audit found: text for people."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console

from bncli.batchnorm import Finding
from bncli.cli.messages import one_line
from bncli.cli.tables.table import print_wrapped
from bncli.wording import plural

MAX_MESSAGES = 5  # different ones of one rule that are all shown; of more, the first
MAX_NAMES = 20
SEVERITIES = ("error", "warning", "info")  # the gravest first


def show_findings(
    console: Console, findings: Sequence[Finding], *, num_rules: int, everything: bool, infos: bool = False
) -> None:
    """The gravest first, by rule: a heading, the layers with their numbers, and what to do.

    Infos are summed up in one line, unless `infos` or `everything` asks for them.
    """
    whole = everything or infos
    shown = sorted((finding for finding in findings if whole or finding.severity != "info"), key=_gravity)
    for _, alike in groupby(shown, key=_gravity):
        _show_rule(console, list(alike), everything=everything)
    number = Counter(finding.severity for finding in findings)
    if not findings:
        console.print(f"No findings: {plural(num_rules, 'rule')} checked.")
        return
    counts = f"{plural(number['error'], 'error')}, {plural(number['warning'], 'warning')}"
    if not number["error"] + number["warning"]:
        counts = f"No errors or warnings: {plural(num_rules, 'rule')} checked"
    if number["info"]:
        print_wrapped(console, _sum_up_infos(findings, shown=whole))
    more = f" For what a code means: bncli explain {shown[0].code}" if shown else ""
    print_wrapped(console, f"{counts}.{more}")


def _gravity(finding: Finding) -> tuple[int, str]:
    return SEVERITIES.index(finding.severity), finding.code


def _sum_up_infos(findings: Sequence[Finding], *, shown: bool) -> str:
    """One line on the findings that are facts or open questions."""
    infos = [finding for finding in findings if finding.severity == "info"]
    number = Counter(finding.name for finding in infos)
    names = ", ".join(f"{name} {count:,}" for name, count in number.items())
    layers = plural(len({finding.layer for finding in infos}), "layer")
    return f"{plural(len(infos), 'note')} in {layers}: {names}" + ("." if shown else "; --all shows them.")


def _show_rule(console: Console, findings: Sequence[Finding], *, everything: bool) -> None:
    first = findings[0]
    style = {"error": "bold red", "warning": "bold yellow", "info": "bold"}[first.severity]
    where = one_line(first.layer) if len(findings) == 1 else plural(len(findings), "layer")
    print_wrapped(console, f"{first.code} {first.name} ({first.severity}): {where}", style=style)
    layers: dict[str, list[str]] = {}
    for finding in findings:
        layers.setdefault(finding.message, []).append(finding.layer)
    most = None if everything else MAX_NAMES
    if everything or len(layers) <= MAX_MESSAGES:
        for message, names in layers.items():
            where = "" if len(findings) == 1 else f"{_list(names, most)}: "
            print_wrapped(console, f"{where}{message}.", indent=2)
    else:
        print_wrapped(console, f"{_list([finding.layer for finding in findings], most)}.", indent=2)
        print_wrapped(console, f"In {one_line(first.layer)}: {first.message}.", indent=2)
    for advice in dict.fromkeys(finding.advice for finding in findings):
        print_wrapped(console, advice, indent=2)
    console.print()


def _list(names: Sequence[str], most: int | None) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(map(one_line, names[:most]))
    return shown + (f", and {len(names) - most:,} more (--all)" if most and len(names) > most else "")
