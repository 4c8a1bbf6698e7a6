"""What a rule is made of: its page, which needs no torch to be read, and a function that looks."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
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


@dataclass(frozen=True, kw_only=True)
class RulePage:
    """What there is to say about a rule, for `bncli explain`; texts may hold `code` between backticks.

    An error certainly makes eval mode compute something else than what was trained. A warning is suspicious,
    or harmless in some networks. An info is a fact that harms no healthy network, or a suspicion that
    nothing in the file decides.
    """

    code: str  # never given to another rule
    name: str
    severity: Severity  # of its gravest hit
    summary: str  # what is found, in one line
    theory: str  # what the finding means, as one paragraph
    cost: str  # what it does to the network's answers
    can_know: str  # what the numbers prove
    cannot_know: str  # what they leave open
    advice: str  # what to do about it
    source: str  # where the theory is from: a paper, PyTorch's documentation, an issue
    thresholds: tuple[Threshold, ...] = ()

    def describe(self) -> dict[str, object]:
        """The page as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(RulePage)}


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


Find = Callable[["Network", Limits], Iterator[Hit]]


@dataclass(frozen=True, kw_only=True)
class Rule(RulePage):
    """One thing that can be said about a BatchNorm layer: the page, and the function that yields hits."""

    find: Find
