"""All cases, made and judged."""

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.audit_corpus.case import Case
from tests.audit_corpus.healthy import healthy_cases
from tests.audit_corpus.ill import ill_cases
from tests.audit_corpus.judge import Verdict, judge
from tests.audit_corpus.networks import published_cases
from tests.audit_corpus.own import own_cases


def all_cases() -> list[Case]:
    """Healthy ones first, by name and place in their files."""
    # bncli's own come first: `bncli train` makes this process keep its memory, which helps the rest
    cases = [*own_cases(), *published_cases(), *healthy_cases(), *ill_cases()]
    return [case for kind in ("healthy/", "ill/") for case in cases if case.name.startswith(kind)]


def find_cases(pattern: str | None) -> list[Case]:
    """Those whose name has the pattern's text, or matches it as a glob."""
    cases = all_cases()
    if pattern is None:
        return cases
    return [case for case in cases if pattern in case.name or fnmatch.fnmatchcase(case.name, pattern)]


def run(cases: Sequence[Case], folder: Path, report: Callable[[str], None] = lambda _: None) -> list[Verdict]:
    """Make the files that are missing in `folder`, then judge them all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small gain nothing from a second one
    try:
        for number, case in enumerate(cases, 1):
            report(f"{number}/{len(cases)} {case.name}")
            case.generate(folder)
        return [judge(case, folder) for case in cases]
    finally:
        torch.set_num_threads(threads)
