"""The scale of an axis or of colours, chosen by what is drawn on it.

Values far from all others must neither flatten the others nor vanish in silence. So a scale ends at robust
quantiles where going on to the last value would cost much of its length, and counts what lies beyond; and
where the values of one scale differ by orders of magnitude, it is logarithmic but for a piece around 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from bncli.wording import plural

if TYPE_CHECKING:  # drawing is rare: the command line starts without torch
    from torch import Tensor

MAX_SHARE_BEYOND = 0.01  # of the values, half of it at each end
HEAVY_TAIL = 50.0  # the largest over a typical value, from which on a linear scale shows nothing
LARGEST = 1e300  # what is larger stands at this: differences of two such numbers are still numbers
LETTER_GAP, MIN_TICK_GAP = 0.028, 0.1  # of the scale's length: what a letter of a label needs, and a label


@dataclass(frozen=True)
class Scale:
    """Where values stand, between which two ends, and how many values lie beyond them."""

    kind: Literal["linear", "log", "symlog"]  # symlog: linear within ±linear_to, logarithmic beyond
    low: float  # a place, as `place` gives it
    high: float
    linear_to: float = 1.0
    num_below: int = 0
    num_above: int = 0
    smallest: float = math.nan
    largest: float = math.nan

    def place(self, values: Tensor) -> Tensor:
        """Where values (...) stand: equal distances look equal. Of the values' shape, float64.

        -inf or NaN for what a logarithm has no place for.
        """
        values = values.double().clamp(-LARGEST, LARGEST)
        if self.kind == "linear":
            return values
        if self.kind == "log":
            return values.log10()
        far = values.sign() * ((values.abs() / self.linear_to).log10() + 1)
        return far.where(values.abs() > self.linear_to, values / self.linear_to)

    def ticks(self) -> dict[float, str]:
        """Places and labels of some round numbers, far enough from each other to be read."""
        best: dict[float, str] = {}
        slack = 1e-9 * (self.high - self.low)
        for numbers in self._candidates():
            places = {self._place(number): number_text(number) for number in sorted(numbers)}
            places = {at: text for at, text in places.items() if self.low - slack <= at <= self.high + slack}
            gap = max(MIN_TICK_GAP, LETTER_GAP * max(map(len, places.values()), default=0))
            if len(places) > len(best) and _smallest_gap(places) >= gap * (self.high - self.low):
                best = places
        return best

    def notes(self, noun: str) -> tuple[str, str]:
        """What lies below and above the scale; "" for nothing."""

        def note(count: int, side: str, farthest: float) -> str:
            return f"{plural(count, noun)} {side}, to {number_text(farthest, 2)}" if count else ""

        below = note(self.num_below, "below the scale", self.smallest)
        return below, note(self.num_above, "above the scale", self.largest)

    def _place(self, value: float) -> float:
        import torch

        return float(self.place(torch.tensor(value, dtype=torch.float64)))

    def _candidates(self) -> list[list[float]]:
        if self.kind == "linear":
            return _multiples(self.low, self.high)
        if self.kind == "log":
            return [*_powers(self.low, self.high), *_multiples(10**self.low, 10**self.high)]
        decades = range(1, math.ceil(max(-self.low, self.high)) + 2)
        sizes = [
            [self.linear_to * 10.0 ** (step * i - 1) for i in decades if step * i < 308] for step in decades
        ]
        return [[0.0, *numbers, *(-number for number in numbers)] for numbers in sizes]


def choose_scale(
    *samples: Tensor,
    log: bool = False,
    middle: float | None = None,
    include: Sequence[float] = (),
    resolution: float = 0.0,
    stretch: float = 1.25,
) -> Scale:
    """The scale for what is drawn: at most 1 % of each of the samples (n,) lies beyond it.

    None does where that takes no more than `stretch` times the length. Values that are not finite, or not
    positive with `log`, do not count. Around a `middle` the two sides are equally long; the numbers of
    `include` are always on the scale. Differences below `resolution` mean nothing and are not magnified.
    What lies beyond is counted in the first sample.
    """
    drawn = [values[values.isfinite() & (values > 0 if log else True)].double() for values in samples]
    drawn = [values.sort().values for values in drawn if len(values)]
    if not drawn:
        return Scale("log", 0.0, 1.0) if log else Scale("linear", -1.0, 1.0)
    kind, linear_to = _kind(drawn, log=log, resolution=resolution)
    scale = Scale(kind, 0.0, 0.0, linear_to)
    places = [scale.place(values) for values in drawn]
    centre = None if middle is None else scale._place(middle)
    cut, whole = _ends(places, centre, MAX_SHARE_BEYOND), _ends(places, centre, 0.0)
    longest = stretch * (cut[1] - cut[0])
    low = whole[0] if cut[1] - whole[0] <= longest else cut[0]
    high = whole[1] if whole[1] - cut[0] <= longest else cut[1]
    included = [scale._place(value) for value in include]
    low, high = _widen(min([low, *included]), max([high, *included]), kind)
    below, above = int((places[0] < low).sum()), int((places[0] > high).sum())
    return Scale(kind, low, high, linear_to, below, above, float(drawn[0][0]), float(drawn[0][-1]))


def number_text(value: float, digits: int = 6) -> str:
    """As a tick is labelled: 0.01 and 1e12, with a real minus sign."""
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "\N{MINUS SIGN}")


def _kind(
    drawn: Sequence[Tensor], *, log: bool, resolution: float
) -> tuple[Literal["linear", "log", "symlog"], float]:
    if log:
        return "log", 1.0
    sizes = [values.abs().sort().values for values in drawn]
    reach = max(float(_rank(size, 1 - MAX_SHARE_BEYOND)) for size in sizes)
    moved = sizes[0][sizes[0] > 0]
    typical = max(float(_rank(moved, 0.5)) if len(moved) else 0.0, resolution)
    if typical > 0 and reach > HEAVY_TAIL * typical:
        return "symlog", 10.0 ** round(math.log10(typical))
    return "linear", 1.0


def _rank(ordered: Tensor, share: float) -> Tensor:
    """The value that at most 1 - share of them exceed."""
    return ordered[-1 - int((1 - share) * len(ordered))]


def _ends(places: Sequence[Tensor], centre: float | None, beyond: float) -> tuple[float, float]:
    """The ends between which all but a share of each of the samples lies; `places` are in rising order."""
    if centre is not None:
        reach = max(float(_rank((x - centre).abs().sort().values, 1 - beyond)) for x in places)
        return centre - reach, centre + reach
    cut = [int(beyond / 2 * len(x)) for x in places]
    low = min(float(x[i]) for x, i in zip(places, cut, strict=True))
    high = max(float(x[-1 - i]) for x, i in zip(places, cut, strict=True))
    return low, high


def _widen(low: float, high: float, kind: str) -> tuple[float, float]:
    """Some length also for values that are equal, or equal but for rounding."""
    least = 0.02 if kind == "log" else 1e-3 * max(abs(low), abs(high))
    if high - low >= max(least, 1 / LARGEST):
        return low, high
    centre, half = (low + high) / 2, (least if least > 1 / LARGEST else 2.0) / 2
    return centre - half, centre + half


def _smallest_gap(places: Iterable[float]) -> float:
    ordered = sorted(places)
    return min((b - a for a, b in pairwise(ordered)), default=math.inf)


def _multiples(low: float, high: float) -> list[list[float]]:
    """Round numbers at equal distances, in closer and closer series."""
    power = math.floor(math.log10(high - low))
    series = []
    for exponent in (power + 1, power, power - 1):
        for factor in (5, 2, 1):
            step = factor * 10.0**exponent
            first, last = math.ceil(low / step), math.floor(high / step)
            if last - first < 1 / MIN_TICK_GAP:
                # through text, so that 3 * 0.1 is 0.3
                series.append([float(f"{i * step:.12g}") for i in range(first, last + 1)])
    return series


def _powers(low: float, high: float) -> list[list[float]]:
    """Powers of ten between two exponents and round numbers between them, in several series."""
    first, last = math.floor(low), math.ceil(high)
    between = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3))
    series = [
        [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        for factors in between
    ]
    for step in range(1, last - first + 1):
        start = -(-first // step) * step  # a multiple, so that 1 is one of them
        series.append([10.0**power for power in range(start, last + 1, step)])
    return series
