"""Which cuts are worth keeping, pass by pass: the least that all passes together can cost.

A pass of stage s that starts at a cut computes what lies between it and the stage's last layer, and reads
those values of the cut that are taken on the way; it may leave a later cut for the passes that follow, which
costs copies of the values that are not kept already. Going backwards from the last stage gives the cheapest
way on from every cut in every stage (dynamic programming). What finds no room, in memory or on disk, is
computed from its images in each pass, and then all images are read. So where the disk is small, cuts with
few bytes win.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import inf

from bncli.batchnorm.population.exact.dataflow import Cut, DataFlow, Value
from bncli.batchnorm.population.exact.stages import Stage

# In the unit of `Cut.cost`, where each number that a small operation puts out counts as one: a copy in
# memory is such an operation. Two cores did 1e11 FLOP/s on a ResNet-50 while 1e9 bytes went to disk and
# back; most of that goes on beside the computation, so a quarter is counted.
_COST_OF_MEMORY_BYTE = 0.25
_COST_OF_DISK_BYTE = 25.0
# Reading, decoding and comparing images: 3 ms for 224x224 pixels in float32.
_COST_OF_INPUT_BYTE = 500.0
_REPEATS = 4  # expected, of a stage whose layers depend on their own output


@dataclass(frozen=True)
class Room:
    """For kept outputs, in bytes."""

    memory: float
    disk: float


class Schedule:
    """The cheapest way through all stages from the first one given, for so many images.

    `cuts` are in order of execution.
    """

    def __init__(
        self,
        flow: DataFlow,
        stages: Sequence[Stage],
        cuts: Sequence[Cut],
        *,
        first: int,
        num_images: int,
        room: Room,
    ) -> None:
        self._flow = flow
        self._cuts = cuts
        self._num_images = num_images
        self._room = room
        self._first = first
        self._shares = [self._share(cut) for cut in cuts]
        numbers = range(first, len(stages))
        num_final = num_final_calls(flow, stages)
        # by stage: the cuts that its pass may leave, and those that it may start from
        leaves = {number: self._usable(stages[number], num_final[number]) for number in numbers}
        self._next: dict[int, dict[int, int]] = {}  # by stage and start, -1 for the beginning
        rest: dict[int, float] = {}  # of all stages after this one, by what its pass leaves
        for number in reversed(numbers):
            before = leaves[number - 1] if number > first else set()
            new = self._worth(leaves[number] - before)
            rest = self._go_back(stages[number], number, {-1, *leaves[number]}, new, rest)

    def next_cut(self, stage: int, start: Cut | None) -> Cut | None:
        """The cut that the pass of this stage should leave for the next one, having started there."""
        index = self._next[stage][-1 if start is None else self._cuts.index(start)]
        return None if index == -1 else self._cuts[index]

    def way(self, start: Cut | None) -> list[Cut]:
        """All cuts that the passes leave, the first stage having started there."""
        found: list[Cut] = []
        for stage in sorted(self._next):
            following = self.next_cut(stage, start)
            if following is not None and following != start:
                found.append(following)
            start = following
        return found

    def _usable(self, stage: Stage, num_final: int) -> set[int]:
        """The cuts whose statistics are final in this stage's pass, and that it gets to."""
        return {
            index
            for index, cut in enumerate(self._cuts)
            if cut.num_layer_calls <= num_final and cut.cost <= stage.cost
        }

    def _worth(self, indices: set[int]) -> list[int]:
        """Those of them, from the last to the first, that have fewer bytes than all that come later."""
        found: list[int] = []
        least = inf
        for index in sorted(indices, reverse=True):
            if self._cuts[index].bytes_per_image < least:
                found.append(index)
                least = self._cuts[index].bytes_per_image
        return found

    def _go_back(
        self, stage: Stage, number: int, starts: set[int], new: Sequence[int], rest: Mapping[int, float]
    ) -> dict[int, float]:
        """Choose for one stage, knowing what follows; what it costs with all that follows, by start."""
        more = _REPEATS - 1 if stage.implicit else 0
        once = {index: self._pass(stage, index) for index in starts}
        choices, costs = self._next.setdefault(number, {}), {}
        for start in starts:
            ways = {start: more * once[start] + rest.get(start, 0.0)}
            for index in new:
                if index > start:
                    ways[index] = self._write(start, index) + more * once[index] + rest.get(index, 0.0)
            choices[start] = min(ways, key=lambda index: ways[index])
            costs[start] = once[start] + ways[choices[start]]
        return costs

    def _pass(self, stage: Stage, start: int) -> float:
        """What the stage's pass costs that starts there."""
        reading = self._flow.input_bytes_per_image * _COST_OF_INPUT_BYTE / self._flow.cost_per_image
        if start == -1:
            return stage.cost + reading
        cut, share = self._cuts[start], sum(self._shares[start])
        from_cut = share * (stage.cost - cut.cost) + self._copy(cut.needed(stage.cost), start)
        return from_cut if share == 1 else from_cut + (1 - share) * stage.cost + reading

    def _write(self, start: int, index: int) -> float:
        """What it costs to keep a cut, having started at another."""
        kept = () if start == -1 else self._cuts[start].values
        return self._copy([value for value in self._cuts[index].values if value not in kept], index)

    def _copy(self, values: Sequence[Value], index: int) -> float:
        """What reading or writing these values of a cut costs, as far as it is kept."""
        memory, disk = self._shares[index]
        cost = memory * _COST_OF_MEMORY_BYTE + disk * _COST_OF_DISK_BYTE
        return cost * sum(value.bytes_per_image for value in values) / self._flow.cost_per_image

    def _share(self, cut: Cut) -> tuple[float, float]:
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
