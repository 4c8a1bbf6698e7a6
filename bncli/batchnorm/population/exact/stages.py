"""In how few passes a network can be measured layer by layer, and how early each pass may stop."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bncli.batchnorm.population.exact.dataflow import Call


@dataclass(frozen=True)
class Stage:
    """Layers that one pass measures: none depends on another, except where `implicit`.

    Implicit are layers whose input depends on their own output: used again further on. Their statistics
    are the solution of an equation, found by repeating the pass.
    """

    layers: dict[str, int]  # calls in one forward pass, by layer
    implicit: bool
    cost: float  # of a pass that stops after the last of those calls, in forward passes


def plan_stages(calls: Sequence[Call]) -> tuple[Stage, ...]:
    """Put every layer into the stage after all layers that it depends on.

    There are as many stages as the longest chain of dependent layers. A layer that could be measured in
    several (the shortcut of a residual block, say) is put where the pass has to go past it anyway, or else
    into the last one, whose pass is already longest.
    """
    needs = _everything_needed(calls)
    # layers that need each other, one that needs itself, or just one
    knots = {name: {name} | {one for one in needs[name] if name in needs[one]} for name in needs}
    before = {name: needs[name] - knots[name] for name in needs}
    first: dict[str, int] = {}  # the earliest stage: as many as the longest chain of layers before it
    for name in sorted(needs, key=lambda name: len(needs[name])):
        first[name] = max((first[one] + 1 for one in before[name]), default=0)
    num_stages = max(first.values(), default=-1) + 1
    last: dict[str, int] = {}  # the latest stage: enough are left for the longest chain after it
    for name in sorted(needs, key=lambda name: -first[name]):
        last[name] = min((last[one] - 1 for one in needs if name in before[one]), default=num_stages - 1)
    ends = {call.layer: call.cost for call in calls}  # of the last call of each
    stops = [0.0] * num_stages
    for name in needs:
        if first[name] == last[name]:
            stops[first[name]] = max(stops[first[name]], ends[name])
    chosen: dict[str, int] = {}
    for name in sorted(needs, key=lambda name: first[name]):
        end = max(ends[one] for one in knots[name])
        low = max((chosen[one] + 1 for one in before[name]), default=0)
        free = (stage for stage in range(low, last[name]) if stops[stage] >= end)
        chosen[name] = next(free, last[name])
        stops[chosen[name]] = max(stops[chosen[name]], end)
    return tuple(_stage(number, chosen, needs, calls, stops[number]) for number in range(num_stages))


def _stage(
    number: int,
    chosen: dict[str, int],
    needs: dict[str, set[str]],
    calls: Sequence[Call],
    cost: float,
) -> Stage:
    num_calls = Counter(call.layer for call in calls)
    members = [name for name in needs if chosen[name] == number]
    implicit = any(name in needs[name] for name in members)
    return Stage({name: num_calls[name] for name in members}, implicit, cost)


def _everything_needed(calls: Sequence[Call]) -> dict[str, set[str]]:
    """For every layer all those that its statistics depend on, in all its uses, directly or not."""
    needs: dict[str, set[str]] = {}
    for call in calls:
        needs.setdefault(call.layer, set()).update(call.sources)
    grown = True
    while grown:  # what a layer used later needs is needed by all that its first use reached
        grown = False
        for name, direct in needs.items():
            indirect = direct.union(*(needs.get(one, set()) for one in direct))
            grown |= indirect != direct
            needs[name] = indirect
    return needs
