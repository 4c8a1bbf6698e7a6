"""Every cause is made by a real PyTorch loop; the loop is the oracle of what may be said about it."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from bncli.batchnorm import MovedAlone, compare, recalibrate
from tests.batchnorm.test_compare import Contents

Batches = Callable[[int], list[Tensor]]


def images(number: int, *, size: int = 32, scale: float = 1.0, shift: float = 0.0) -> list[Tensor]:
    """Batches whose images differ in brightness, as photographs do."""
    return [(torch.randn(size, 3, 8, 8) + torch.randn(size, 3, 1, 1)) * scale + shift for _ in range(number)]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 4),
    )  # fmt: skip


def settled() -> nn.Sequential:
    """A network whose running statistics are those of its weights."""
    net = network().train()
    with torch.no_grad():
        for batch in images(50):
            net(batch)
    return net


def train_head(net: nn.Sequential, batches: list[Tensor]) -> None:
    """A linear probe: only the last layer learns, and everything is in train mode."""
    for parameter in net[:-1].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(net[-1].parameters(), lr=0.05)
    net.train()
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch), torch.randint(4, (len(batch),))).backward()
        optimizer.step()


def moved_alone(first: nn.Module, second: nn.Module) -> MovedAlone:
    found = compare(*(Contents(dict(net.state_dict()), net) for net in (first, second)))
    assert found.moved_alone is not None
    assert found.moved_alone.layers == tuple(
        layer.name for layer in found.layers if "statistics_moved_weights_unchanged" in layer.flags
    )
    return found.moved_alone


def test_a_teacher_left_in_train_mode_has_counted_the_batches_of_the_same_data() -> None:
    before = settled()
    teacher, student = copy.deepcopy(before).train(), network().train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for batch in images(37):
        with torch.no_grad():
            wanted = teacher(batch)
        optimizer.zero_grad()
        nn.functional.mse_loss(student(batch), wanted).backward()
        optimizer.step()
    found = moved_alone(before, teacher)
    assert (found.layers, found.counters, found.num_batches) == (("1", "4"), "grown", 37)
    assert (found.first_layer, found.first_layer_moved, found.num_farther) == (
        "1",
        "as averaging explains",
        0,
    )
    text = str(found)
    assert "grew by 37 in each of them" in text
    assert "left in train mode: a teacher" in text
    assert "same distribution" not in text
    assert "nothing here shows that the images differ" in text


def test_a_linear_probe_on_other_images_is_told_by_its_first_layer() -> None:
    before = settled()
    probe = copy.deepcopy(before)
    train_head(probe, images(60, scale=1.5, shift=0.5))
    found = moved_alone(before, probe)
    assert (found.layers, found.counters, found.num_batches) == (("1", "4"), "grown", 60)
    assert found.first_layer_moved == "farther"
    assert any("other images" in cause for cause in found.possible_causes)
    assert any("linear probe" in cause for cause in found.possible_causes)
    same = copy.deepcopy(before)
    train_head(same, images(60))
    assert moved_alone(before, same).first_layer_moved == "as averaging explains"


def test_ranks_have_the_same_weights_and_counters_and_other_statistics() -> None:
    """Data parallelism by hand: every rank has its own batches, and all take the mean gradient."""
    ranks = [network().train()]
    ranks.append(copy.deepcopy(ranks[0]))
    optimizers = [torch.optim.SGD(rank.parameters(), lr=0.05) for rank in ranks]
    for own in zip(images(40), images(40), strict=True):
        for rank, batch in zip(ranks, own, strict=True):
            rank.zero_grad()
            rank(batch).square().mean().backward()
        for pair in zip(*(rank.parameters() for rank in ranks), strict=True):
            gradient = (pair[0].grad + pair[1].grad) / 2
            for parameter in pair:
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    found = moved_alone(*ranks)
    assert (found.counters, found.num_batches) == ("equal", None)
    assert (found.first_layer_moved, found.num_farther) == ("as averaging explains", 0)
    assert "ranks of one distributed run" in found.possible_causes[0]
    assert not any("train mode" in cause for cause in found.possible_causes)


def test_update_bn_starts_the_counter_anew() -> None:
    before = settled()
    after = copy.deepcopy(before)
    update_bn(images(25), after)
    found = moved_alone(before, after)
    assert (found.counters, found.num_batches) == ("lower", None)
    assert "update_bn" in found.possible_causes[0]
    assert moved_alone(after, before).counters == "grown"  # in the wrong order it looks like train mode ...
    assert any(
        "update_bn" in cause for cause in moved_alone(after, before).possible_causes
    )  # ... and says so


def test_a_recalibration_leaves_the_counters_alone() -> None:
    before = settled()
    after = copy.deepcopy(before)
    recalibrate(after, images(25))
    found = moved_alone(before, after)
    assert found.counters == "equal"
    assert any("bncli recalibrate" in cause for cause in found.possible_causes)


def test_averaged_weights_that_are_repaired_have_moved_in_the_depth_only() -> None:
    """The first convolution is frozen, so that the average is of the later weights alone."""
    net = settled()
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    optimizer = torch.optim.SGD(net[3:].parameters(), lr=0.5, weight_decay=0.1)
    average = AveragedModel(net)
    for batch in images(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch), torch.randint(4, (len(batch),))).backward()
        optimizer.step()
        average.update_parameters(net)
    stale, repaired = average.module, copy.deepcopy(average.module)
    update_bn(images(60), repaired)
    found = moved_alone(stale, repaired)
    assert (found.first_layer_moved, found.num_farther) == ("as averaging explains", 1)
    assert any("earlier weights" in cause for cause in found.possible_causes)
    assert "1 later layer did" in str(found)


def test_a_first_layer_in_eval_mode_says_nothing_about_the_images() -> None:
    before = settled()
    after = copy.deepcopy(before).train()
    after[1].eval()
    for batch in images(20, shift=3.0):
        after(batch)
    found = moved_alone(before, after)
    assert (found.layers, found.counters, found.num_batches) == (("4",), "grown", 20)
    assert found.first_layer_moved == "not at all"
    assert not any("other images" in cause for cause in found.possible_causes)


def test_a_layer_that_runs_twice_has_counted_twice() -> None:
    norms = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    before = nn.Sequential(norms[0], nn.Conv2d(3, 3, 1), norms[1], nn.Conv2d(3, 3, 1), norms[1])
    after = copy.deepcopy(before).train()
    for batch in images(5):
        after(batch)
    assert moved_alone(before, after).counters == "unequal"


@pytest.mark.parametrize("counter", [None, torch.tensor(50.0)])
def test_a_counter_that_is_none_or_no_integer_is_no_evidence(counter: Tensor | None) -> None:
    before = settled()
    after = copy.deepcopy(before).train()
    for batch in images(5):
        after(batch)
    after[4].num_batches_tracked = counter
    found = moved_alone(before, after)
    assert (found.counters, found.num_batches) == ("unknown", None)


def test_where_names_are_sorted_nothing_is_said_about_the_first_layer() -> None:
    before = settled()
    after = copy.deepcopy(before)
    after(images(1, shift=9.0)[0])
    states = [dict(sorted(net.state_dict().items())) for net in (before, after)]
    found = compare(*map(Contents, states)).moved_alone
    assert (found.first_layer, found.first_layer_moved, found.num_batches) == (None, None, 1)
    assert "It is unknown which layer comes first, or how far it moved." in found.known


@pytest.mark.parametrize("momentum", [0.1, 0.4, None])
@pytest.mark.parametrize("size", [32, 128])
def test_averaging_the_same_data_never_looks_like_other_data(momentum: float | None, size: int) -> None:
    """At its worst: images of one colour each, so that a batch has as many values as images."""
    for seed in range(8):
        torch.manual_seed(seed)
        nets = [nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, momentum=momentum)).train()]
        nets.append(copy.deepcopy(nets[0]))
        for net in nets:
            with torch.no_grad():
                for _ in range(40):
                    net(torch.randn(size, 3, 1, 1).expand(-1, -1, 2, 2) * 3 + 5)
        assert moved_alone(*nets).first_layer_moved == "as averaging explains"


def test_nothing_is_known_of_nothing() -> None:
    net = settled()
    assert compare(*(Contents(dict(net.state_dict())) for _ in range(2))).moved_alone is None


def test_a_comparison_prints_in_a_few_lines_what_it_found() -> None:
    before = settled()
    after = copy.deepcopy(before)
    update_bn(images(25), after)
    lines = str(compare(*(Contents(dict(net.state_dict())) for net in (before, after)))).splitlines()
    assert lines[0] == "2 BatchNorm layers compared, matched by name."
    assert lines[1].startswith("6 of 16 tensors differ. The statistics that moved farthest are in ")
    assert lines[2].startswith("statistics_moved_weights_unchanged (1, 4): The weights before these layers")
    assert len(lines) == 3
