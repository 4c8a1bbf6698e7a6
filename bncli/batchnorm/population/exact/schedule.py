"""Which cuts are worth keeping, pass by pass: the least that all passes together can cost.

A pass of stage s that starts at a cut computes what lies between it and the stage's last layer, and reads
the cut's output; on its way it may keep a later cut for the passes that follow, which costs a copy. Going
backwards from the last stage gives the cheapest way on from every cut in every stage (dynamic programming).
What finds no room, in memory or on disk, is computed from the start in each pass. So where the disk is
small, cuts with small outputs win.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import inf

from bncli.batchnorm.population.exact.dataflow import Cut, DataFlow
from bncli.batchnorm.population.exact.stages import Stage

# In the unit of `Cut.cost`, where each number that a small operation puts out counts as one: a copy in
# memory is such an operation. Two cores did 1e11 FLOP/s on a ResNet-50 while 1e9 bytes went to disk and
# back; most of that goes on beside the computation, so a quarter is counted.
_COST_OF_MEMORY_BYTE = 0.25
_COST_OF_DISK_BYTE = 25.0
_REPEATS = 4  # expected, of a stage whose layers depend on their own output


@dataclass(frozen=True)
class Room:
    """For kept outputs, in bytes."""

    memory: float
    disk: float


class Schedule:
    """The cheapest way through all stages for so many images. `cuts` are in order of execution."""

    def __init__(
        self, flow: DataFlow, stages: Sequence[Stage], cuts: Sequence[Cut], num_images: int, room: Room
    ) -> None:
        self._flow = flow
        self._cuts = cuts
        self._num_images = num_images
        self._room = room
        # for each stage and start, no cut first: the next cut to keep, counted from 1, or where it stays
        self._next: list[list[int]] = []
        rest = [0.0] * (len(cuts) + 1)  # of all stages after this one, by what its pass leaves
        for stage, num_final in reversed(list(zip(stages, num_final_calls(flow, stages), strict=True))):
            rest = self._go_back(stage, num_final, rest)
        self._next.reverse()
        self.cost = rest[0]  # of everything, in forward passes, with what copies cost

    def next_cut(self, stage: int, start: Cut | None) -> Cut | None:
        """The cut that the pass of this stage should leave for the next one, having started there."""
        chosen = self._next[stage][0 if start is None else self._cuts.index(start) + 1]
        return self._cuts[chosen - 1] if chosen else None

    def largest(self) -> float:
        """Bytes per image of the largest output that is kept by the way from the first stage on."""
        found, at = 0.0, 0
        for choices in self._next:
            at = choices[at]
            found = max(found, self._cuts[at - 1].bytes_per_image if at else 0.0)
        return found

    def _go_back(self, stage: Stage, num_final: int, rest: Sequence[float]) -> list[float]:
        """Choose for one stage, knowing what follows; what it costs with all that follows, by start."""
        once = [self._pass(stage, cut) for cut in (None, *self._cuts)]
        more = _REPEATS - 1 if stage.implicit else 0
        best, best_cost = 0, inf  # of the cuts from here on
        choices, costs = [0] * len(once), [0.0] * len(once)
        for index in range(len(once) - 1, -1, -1):
            stay = more * once[index] + rest[index]
            go = best_cost < stay
            choices[index] = best if go else index
            costs[index] = once[index] + (best_cost if go else stay)
            cut = self._cuts[index - 1] if index else None
            # its statistics must be final, and the pass must get there
            if cut is not None and cut.num_layer_calls <= num_final and cut.cost <= stage.cost:
                arrive = self._copy(cut) + stay
                if arrive <= best_cost:
                    best, best_cost = index, arrive
        self._next.append(choices)
        return costs

    def _pass(self, stage: Stage, cut: Cut | None) -> float:
        """What the stage's pass costs that starts there."""
        if cut is None:
            return stage.cost
        return stage.cost - sum(self._shares(cut)) * cut.cost + self._copy(cut)

    def _copy(self, cut: Cut) -> float:
        """What writing or reading it costs, as far as it is kept."""
        memory, disk = self._shares(cut)
        cost = memory * _COST_OF_MEMORY_BYTE + disk * _COST_OF_DISK_BYTE
        return cost * cut.bytes_per_image / self._flow.cost_per_image

    def _shares(self, cut: Cut) -> tuple[float, float]:
        """Of the images: how many are kept in memory, and how many on disk."""
        num_bytes = max(cut.bytes_per_image * self._num_images, 1.0)
        memory = min(1.0, self._room.memory / num_bytes)
        return memory, min(1.0 - memory, self._room.disk / num_bytes)


def num_final_calls(flow: DataFlow, stages: Sequence[Stage]) -> list[int]:
    """For each stage how many calls of layers, from the first, are on final statistics in its pass."""
    final: set[str] = set()
    found = []
    for stage in stages:
        found.append(sum(1 for _ in takewhile(final.__contains__, (call.layer for call in flow.calls))))
        final |= stage.layers.keys()
    return found
