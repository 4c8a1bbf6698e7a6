"""What is kept: against every way there is on a small example, and what ResNet-50 costs with little room."""

from collections.abc import Iterator, Sequence
from itertools import product

import pytest
import torch
from torch import nn

from bncli.batchnorm import batch_norm_layers
from bncli.batchnorm.population.exact.dataflow import Call, Cut, DataFlow, Value, trace_flow
from bncli.batchnorm.population.exact.schedule import Room, Schedule, num_final_calls
from bncli.batchnorm.population.exact.stages import Stage, plan_stages
from bncli.torchvision_compat import import_torchvision

COST = 1e6  # of a forward pass of one image
SHORTCUT = Value("shortcut", 0, 3000.0)


def chain(bytes_per_image: Sequence[float], *, shortcut: bool = False) -> DataFlow:
    """Layers a tenth of the pass apart, each behind a module whose output can be kept."""
    calls, cuts = [], []
    for index, size in enumerate(bytes_per_image):
        cost = (index + 1) / 10
        calls.append(Call(f"bn{index}", frozenset(f"bn{one}" for one in range(index)), cost))
        values = (Value(f"conv{index}", 0, size),)
        uses = (cost,)
        if shortcut and index:  # taken at the very end
            values, uses = (SHORTCUT, *values), (0.95, *uses)
        cuts.append(Cut(f"conv{index}", 0, values, uses, index, cost))
    return DataFlow(tuple(calls), tuple(cuts), COST, 100.0)


def ways_through(flow: DataFlow, stages: Sequence[Stage]) -> Iterator[tuple[Cut | None, ...]]:
    """What every pass may leave: what it started from, or a later cut that it may leave."""
    final = num_final_calls(flow, stages)
    for way in product((None, *flow.cuts), repeat=len(stages)):
        at: Cut | None = None
        for stage, num_final, following in zip(stages, final, way, strict=True):
            if following != at and (
                following is None
                or (at is not None and following.cost <= at.cost)
                or following.num_layer_calls > num_final
                or following.cost > stage.cost
            ):
                break
            at = following
        else:
            yield way


def price(way: Sequence[Cut | None], stages: Sequence[Stage], num_images: int, room: Room) -> float:
    """Written down once more, in units of the forward pass of one image, for all that is kept on disk."""
    total, at = 0.0, None
    reading = 100.0 * 500 / COST

    def share(cut: Cut) -> float:
        return min(1.0, room.disk / (cut.bytes_per_image * num_images))

    for stage, following in zip(stages, way, strict=True):
        if at is None:
            total += stage.cost + reading
        else:
            kept = share(at)
            moved = sum(one.bytes_per_image for one in at.needed(stage.cost)) * 25 / COST
            total += kept * (stage.cost - at.cost + moved) + (1 - kept) * stage.cost
            total += 0.0 if kept == 1 else reading
        if following is not None and following != at:
            new = set(following.values) - set(() if at is None else at.values)
            total += share(following) * sum(one.bytes_per_image for one in new) * 25 / COST
        at = following
    return total


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("room", [0, 100_000, 200_000, 300_000, 500_000, 10**9])
@pytest.mark.parametrize("sizes", [(1000, 2000, 500, 3000, 100), (5000, 4000, 3000, 2000, 1000), (2000,) * 5])
def test_the_way_chosen_is_the_cheapest(sizes: tuple[float, ...], room: float, shortcut: bool) -> None:
    flow = chain(sizes, shortcut=shortcut)
    stages = plan_stages(flow.calls)
    limits = Room(0, room)
    schedule = Schedule(flow, stages, flow.cuts, first=0, num_images=100, room=limits)
    chosen: list[Cut | None] = []
    for number in range(len(stages)):
        chosen.append(schedule.next_cut(number, chosen[-1] if chosen else None))
    best = min(price(way, stages, 100, limits) for way in ways_through(flow, stages))
    # cuts that have more bytes than a later one of the same stage are not looked at; here there is none
    assert price(chosen, stages, 100, limits) == pytest.approx(best)
    if room == 10**9:
        assert schedule.way(None)
    if room == 0:
        assert price(chosen, stages, 100, limits) == pytest.approx(sum(one.cost + 0.05 for one in stages))


def test_statistics_must_be_final_before_anything_behind_them_is_kept() -> None:
    flow = chain((10,) * 5)
    stages = plan_stages(flow.calls)
    assert num_final_calls(flow, stages) == [0, 1, 2, 3, 4]
    way = Schedule(flow, stages, flow.cuts, first=0, num_images=1, room=Room(1e9, 0)).way(None)
    assert [cut.module for cut in way] == ["conv0", "conv1", "conv2", "conv3"]
    later = Schedule(flow, stages, flow.cuts, first=3, num_images=1, room=Room(1e9, 0))
    assert later.next_cut(3, flow.cuts[1]) == flow.cuts[3]


def test_a_pass_that_is_repeated_starts_from_what_its_first_time_left() -> None:
    flow = chain((10,) * 3)
    stages = [Stage({"bn0": 1}, False, 0.1), Stage({"bn1": 1, "bn2": 1}, True, 0.3)]
    schedule = Schedule(flow, stages, flow.cuts, first=0, num_images=1, room=Room(1e9, 0))
    assert schedule.next_cut(1, flow.cuts[0]) == flow.cuts[1]
    assert schedule.next_cut(1, flow.cuts[1]) == flow.cuts[1]


def passes(model: nn.Module, room_per_image: float) -> float:
    """Forward passes of `exact` over any number of images at 224x224, with so many bytes on disk an image."""
    images = torch.zeros(1, 3, 224, 224)
    with torch.device("meta"):
        flow = trace_flow(model, images, dict(batch_norm_layers(model)))
    stages = plan_stages(flow.calls)
    many = 10**6
    room = Room(0, room_per_image * many)
    schedule = Schedule(flow, stages, flow.cuts, first=0, num_images=many, room=room)
    total, at = 0.0, None
    for number, stage in enumerate(stages):
        kept = 0.0 if at is None else min(1.0, room.disk / (at.bytes_per_image * many))
        total += stage.cost - (0.0 if at is None else kept * at.cost)
        at = schedule.next_cut(number, at)
    return total


def test_resnet50_takes_four_forward_passes_with_a_quarter_of_the_room_that_it_could_use() -> None:
    import_torchvision()
    from torchvision.models import resnet50

    with torch.device("meta"):
        model = resnet50()
    assert passes(model, 0) > 25
    assert passes(model, 1.25e6) < 4
    assert passes(model, 1.61e6) < 2.8
    assert passes(model, 4.9e6) < 1.2
