import pytest
import torch
from torch import Tensor, nn

from bncli.batchnorm import batch_norm_layers
from bncli.batchnorm.population.exact.dataflow import Call, trace_flow
from bncli.batchnorm.population.exact.stages import plan_stages
from tests.batchnorm.networks import Residual, Shared, Twins


def sources(model: nn.Module, data: Tensor) -> list[tuple[str, set[str]]]:
    calls = trace_flow(model, data, dict(batch_norm_layers(model))).calls
    return [(call.layer, set(call.sources)) for call in calls]


def test_every_call_knows_what_its_input_was_made_from() -> None:
    data = torch.randn(2, 3, 8, 8)
    everything = {"bn1", "bn2", "bn3"}
    assert sources(Residual(), data) == [
        ("bn1", set()),
        ("bn2", {"bn1"}),
        ("bn3", set()),
        ("bn4", everything),
    ]
    assert sources(Shared(), data) == [
        ("bn0", set()),
        ("bn", {"bn0"}),
        ("bn", {"bn0", "bn"}),
        ("after", {"bn0", "bn"}),
    ]
    assert sources(Twins(), data) == [("bn", set()), ("bn", set()), ("after", {"bn"})]


class Tricky(nn.Module):
    """Ways in which a value gets from one layer to the next."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.one, self.two = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y, clean = self.one(x), x.clone()
        if self.way == "a view written to":
            clean[:, 1:3].mul_(2)
            clean.t()[0].copy_(y[:, 0])
        elif self.way == "out=":
            torch.add(y, 1, out=clean)
        elif self.way == "item":
            clean = x * y.sum().item()
        elif self.way == "if":
            clean = x + 1 if y.mean() > 0 else x
        elif self.way == "index":
            clean = x[y.argmax(1).clamp(0, 1)]
        elif self.way == "where":
            clean = torch.where(y > 0, x, -x)
        elif self.way == "foreach":
            torch._foreach_add_([clean], [y])
        return self.two(clean)


@pytest.mark.parametrize("way", ["a view written to", "out=", "item", "if", "index", "where", "foreach"])
def test_no_way_of_passing_a_value_is_missed(way: str) -> None:
    assert sources(Tricky(way), torch.randn(6, 4)) == [("one", set()), ("two", {"one"})]


def test_what_takes_no_value_does_not_depend() -> None:
    assert sources(Tricky("none"), torch.randn(6, 4)) == [("one", set()), ("two", set())]


def test_costs_are_floating_point_operations() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(18, 100),
        nn.BatchNorm1d(100),
    )
    first, second = trace_flow(model, torch.randn(2, 1, 5, 5), dict(batch_norm_layers(model))).calls
    conv, linear = 2 * (2 * 2 * 9 * 9), 2 * (2 * 18 * 100)
    assert first.cost == pytest.approx(conv / (conv + linear), rel=0.1)
    assert 0.9 < second.cost < 1
    assert not model[1]._forward_hooks
    assert not model[1]._forward_pre_hooks


def call(layer: str, needs: str, cost: float) -> Call:
    return Call(layer, frozenset(needs), cost)


def planned(*calls: Call) -> list[tuple[str, float, bool]]:
    return [("".join(sorted(one.layers)), one.cost, one.implicit) for one in plan_stages(calls)]


def test_a_chain_takes_a_pass_per_layer_each_as_short_as_can_be() -> None:
    found = planned(call("a", "", 0.1), call("b", "a", 0.4), call("c", "ab", 0.9))
    assert found == [("a", 0.1, False), ("b", 0.4, False), ("c", 0.9, False)]
    assert planned() == []


def test_a_shortcut_shares_the_pass_that_goes_past_it_anyway() -> None:
    behind = [call("a", "", 0.1), call("b", "a", 0.3), call("s", "", 0.4), call("c", "abs", 0.9)]
    assert planned(*behind) == [("a", 0.1, False), ("bs", 0.4, False), ("c", 0.9, False)]
    before = [call("s", "", 0.05), call("a", "", 0.1), call("b", "a", 0.3), call("c", "abs", 0.9)]
    assert planned(*before) == [("as", 0.1, False), ("b", 0.3, False), ("c", 0.9, False)]
    # two layers in a row that nothing follows
    branch = [
        call("a", "", 0.1),
        call("b", "a", 0.3),
        call("c", "ab", 0.5),
        call("s", "", 0.7),
        call("t", "s", 0.8),
    ]
    assert planned(*branch) == [("a", 0.1, False), ("bs", 0.7, False), ("ct", 0.8, False)]


def test_layers_that_need_each_other_are_one_stage() -> None:
    once_more = [call("a", "", 0.1), call("b", "a", 0.2), call("a", "ab", 0.3), call("c", "a", 0.4)]
    assert planned(*once_more) == [("ab", 0.3, True), ("c", 0.4, False)]
    (first, second) = plan_stages(once_more)
    assert first.layers == {"a": 2, "b": 1}
    # c was made from a's first use only, and yet depends on b, since a's statistics do
    early = [call("a", "", 0.1), call("c", "a", 0.15), call("b", "", 0.2), call("a", "b", 0.3)]
    assert [one[0] for one in planned(*early)] == ["b", "a", "c"]
    assert second.layers == {"c": 1}
