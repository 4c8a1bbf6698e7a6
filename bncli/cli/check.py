"""One line of `bncli doctor`'s answer."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Literal["ok", "warning", "problem"]
    found: str
    fix: str | None = None  # what to do about a warning or a problem
