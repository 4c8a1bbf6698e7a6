"""What a rule is made of: code, severity, thresholds, a function that looks, and its docstring as a page."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from bncli.batchnorm.audit.channels import Network

Severity = Literal["error", "warning", "info"]  # from bad to harmless
Values = dict[str, float | int | str | bool]
Limits = Mapping[str, float]  # thresholds by name


@dataclass(frozen=True)
class Threshold:
    """A number that a rule compares with; `reason` says why the default is what it is."""

    name: str
    default: float
    meaning: str
    reason: str


@dataclass(frozen=True)
class Hit:
    """A layer in which a rule found something."""

    index: int  # of the layer
    channels: tuple[int, ...]  # empty: the layer as a whole
    values: Values
    text: str  # the numbers in words
    severity: Severity | None = None  # None: the rule's; never above it
    advice: str | None = (
        None  # what to do where more is known than the rule knows in general; None: the rule's
    )


Find = Callable[[Network, Limits], Iterator[Hit]]


@dataclass(frozen=True)
class Rule:
    """One thing that can be said about a BatchNorm layer.

    An error certainly makes eval mode compute something else than what was trained. A warning is suspicious,
    or harmless in some networks. An info is a fact that harms no healthy network, or a suspicion that
    nothing in the file decides.
    """

    code: str  # never given to another rule
    name: str
    severity: Severity  # of its gravest hit
    summary: str  # what is found, in one line
    advice: str  # what to do about it
    thresholds: tuple[Threshold, ...]
    theory: str  # why it matters, as one paragraph
    can_know: str  # what the numbers prove
    cannot_know: str  # what they leave open
    source: str  # where the theory is from: a paper, PyTorch's documentation, an issue
    find: Find

    def describe(self) -> dict[str, object]:
        """The rule as plain values, its page included."""
        return {name: value for name, value in vars(self).items() if name != "find"}


def rule(
    code: str, severity: Severity, summary: str, *, advice: str, thresholds: tuple[Threshold, ...] = ()
) -> Callable[[Find], Rule]:
    """Make a rule of a function that yields hits, in the order of the layers.

    The function's name is the rule's. Its docstring is the page of `--explain`: the theory, and paragraphs
    that begin with `Knows:`, `Cannot know:` and `Source:`.
    """

    def decorate(find: Find) -> Rule:
        page = _page(inspect.getdoc(find) or "")
        return Rule(
            code=code,
            name=find.__name__,
            severity=severity,
            summary=summary,
            advice=advice,
            thresholds=thresholds,
            theory=page.get("", ""),
            can_know=page.get("Knows", ""),
            cannot_know=page.get("Cannot know", ""),
            source=page.get("Source", ""),
            find=find,
        )

    return decorate


def _page(text: str) -> dict[str, str]:
    """The paragraphs of a docstring by their heading, each on one line; the theory has none."""
    parts: dict[str, str] = {}
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        heading, colon, rest = words.partition(": ")
        named = colon and heading in ("Knows", "Cannot know", "Source")
        parts |= {heading: rest} if named else {"": f"{parts.get('', '')} {words}".strip()}
    return parts
