"""Starting in the middle of a forward pass against starting at its beginning: the same bits, or not used."""

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bncli.batchnorm import Population, batch_norm_layers, measure_population
from bncli.batchnorm.bits import bitwise_equal
from bncli.batchnorm.population.exact import kept, restart, spill
from bncli.batchnorm.population.exact.dataflow import trace_flow
from bncli.batchnorm.population.exact.stages import plan_stages
from bncli.batchnorm.population.hooks import RestartError
from tests.batchnorm.networks import Residual, Shared, Twins, mixed


def images(num: int = 24, side: int = 8) -> Tensor:
    return torch.randn(num, 3, side, side) * 2 + 1


class Chain(nn.Module):
    """Each convolution's output is written to, and a second time would give something else."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1))
        self.norms = nn.Sequential(*(nn.BatchNorm2d(num) for num in (4, 8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(nn.functional.silu(conv(x), inplace=True))
        return x


def both_ways(
    monkeypatch: pytest.MonkeyPatch,
    model: nn.Module,
    batches: list[Tensor] | Callable[[], object],
    max_bytes: int = 2**20,
    disk_bytes: int = 0,
) -> tuple[Population, Population]:
    """Without keeping anything, and with."""
    found = []
    for memory, disk in ((0, 0), (max_bytes, disk_bytes)):
        monkeypatch.setattr(kept, "MAX_BYTES", memory)
        monkeypatch.setattr(spill, "usable_bytes", lambda disk=disk: disk)
        found.append(measure_population(model, batches))
    return found[0], found[1]


def same_bits(one: Population, other: Population) -> bool:
    pairs = [(a.moments, b.moments) for a, b in zip(one.layers, other.layers, strict=True)]
    return all(bitwise_equal(a.mean, b.mean) and bitwise_equal(a.m2, b.m2) for a, b in pairs)


def cuts_of(model: nn.Module, data: Tensor) -> list[tuple[str, int, int]]:
    cuts = trace_flow(model, data, dict(batch_norm_layers(model))).cuts
    return [(cut.module, cut.number, cut.num_layer_calls) for cut in cuts]


def hooks_of(model: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def test_a_cut_is_where_nothing_else_goes_on() -> None:
    data = images()
    assert cuts_of(Chain(), data) == [
        ("convs.0", 0, 0), ("norms.0", 0, 1), ("convs.1", 0, 1), ("norms.1", 0, 2), ("convs.2", 0, 2),
    ]  # fmt: skip
    # the images are needed until the shortcut is computed, and what is summed is no module's output
    assert cuts_of(Residual(), data) == [("short", 0, 2), ("bn3", 0, 3), ("head", 0, 3)]
    assert cuts_of(Shared(), data) == [
        ("bn0", 0, 1), ("conv", 0, 1), ("bn", 0, 2), ("conv", 1, 2), ("bn", 1, 3), ("conv", 2, 3),
    ]  # fmt: skip
    # both branches take the images
    assert cuts_of(Twins(), data) == []


class Overwritten(nn.Module):
    """What the first convolution put out is doubled in place, and taken as it is then."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        z = self.norm(y)
        y.mul_(2)
        return self.two(z) + y


def test_what_was_written_to_is_no_longer_what_a_module_returned() -> None:
    assert cuts_of(Overwritten(), images()) == [("one", 0, 0), ("norm", 0, 1)]


def test_a_value_is_needed_from_the_layer_on_that_takes_it() -> None:
    model = Residual()
    flow = trace_flow(model, images(), dict(batch_norm_layers(model)))
    short = flow.cuts[0]
    (shortcut_norm,) = (call for call in flow.calls if call.layer == "bn3")
    assert [value.module for value in short.needed(shortcut_norm.cost)] == ["short"]
    assert [value.module for value in short.needed(1.0)] == ["bn2", "short"]


def test_a_cut_knows_its_cost_and_what_it_takes_to_keep_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1, bias=False))
    first, second = trace_flow(model, images(6), dict(batch_norm_layers(model))).cuts
    products = [2 * 27 * 4 * 36, 2 * 4 * 5 * 36]
    assert first.cost == pytest.approx(products[0] / sum(products), rel=0.05)
    assert first.bytes_per_image == second.bytes_per_image == 4 * 36 * 4


@pytest.mark.parametrize("network", [Residual, Shared, Twins, Chain])
@pytest.mark.parametrize("sizes", [[8, 8, 8], [1, 13, 2, 8], [24]])
def test_starting_in_the_middle_changes_no_bit(
    network: type[nn.Module], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    plain, kept = both_ways(monkeypatch, model, list(images().split(sizes)))
    assert same_bits(plain, kept)
    assert kept.forward_passes <= plain.forward_passes
    assert hooks_of(model) == 0


def test_a_chain_of_layers_costs_one_forward_pass(
    monkeypatch: pytest.MonkeyPatch, trials: dict[restart.Restarts, float]
) -> None:
    plain, kept = both_ways(monkeypatch, Chain(), list(images(120).split(12)))
    assert plain.forward_passes > 1.8
    (tried,) = trials.values()
    assert kept.forward_passes - tried / 120 < 1.15  # 0.1 is the first look


class Block(nn.Module):
    """Nothing can be cut within it, so several passes start from what goes in, which it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(num, 4, 3, padding=1) for num in (3, 4, 4, 4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = y = nn.functional.silu(self.convs[0](x), inplace=True)
        for conv, norm in zip(list(self.convs)[1:], self.norms, strict=True):
            y = norm(conv(y))
        return x + y


def test_what_is_kept_serves_more_than_once(
    monkeypatch: pytest.MonkeyPatch, trials: dict[restart.Restarts, float]
) -> None:
    plain, kept = both_ways(monkeypatch, Block(), list(images().split(8)))
    assert same_bits(plain, kept)
    (tried,) = trials.values()
    assert kept.forward_passes - tried / 24 < plain.forward_passes - 2 * 0.15


@pytest.mark.parametrize(("network", "expected"), [(Chain, 2), (nn.BatchNorm2d, 0)])
def test_nothing_is_kept_for_a_pass_that_does_not_come(
    network: Callable[..., nn.Module], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[restart.Cut] = []
    keeping = restart.Restarts._keeping

    def watched(
        self: restart.Restarts, cut: restart.Cut | None, digest: bytes
    ) -> AbstractContextManager[None]:
        if cut is not None:
            made.append(cut)
        return keeping(self, cut, digest)

    monkeypatch.setattr(restart.Restarts, "_keeping", watched)
    model = network() if network is Chain else network(3)
    found = measure_population(model, list(images().split(8)))
    assert found.num_passes == expected + 1
    assert len(made) == 3 * expected  # three batches
    assert len(set(made)) == expected


def test_layers_of_every_dimension_and_without_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = mixed(), torch.randn(24, 2, 3, 4, 4)
    model.eval()(data)  # builds the lazy layer
    assert same_bits(*both_ways(monkeypatch, model, list(data.split(8))))


def test_autocast_is_as_it_was_behind_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        plain, kept = both_ways(monkeypatch, Chain(), list(images().split(8)))
        assert torch.is_autocast_enabled("cpu")
    assert same_bits(plain, kept)
    assert kept.forward_passes < plain.forward_passes


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("max_bytes", [4 * 8 * 36 * 24, 6000, 10])
def test_what_finds_no_room_is_computed_from_its_start(
    max_bytes: int, on_disk: bool, monkeypatch: pytest.MonkeyPatch, trials: dict[restart.Restarts, float]
) -> None:
    """All of it finds room, or one batch of six (and pages of its own on disk), or none."""
    held: list[int] = []
    forward = restart.Restarts.forward

    def watched(self: restart.Restarts, inputs: Tensor) -> None:
        try:
            forward(self, inputs)
        finally:
            file = self._kept._file
            assert file is None or file._num_bytes <= max_bytes + 2**14
            held.append(len(self._kept))

    monkeypatch.setattr(restart.Restarts, "forward", watched)
    limits = (0, max_bytes + 2**14) if on_disk and max_bytes > 10 else (max_bytes, 0)
    plain, some = both_ways(monkeypatch, Chain(), list(images().split(4)), *limits)
    assert same_bits(plain, some)
    some_room = max_bytes > 10
    assert (max(held) > 0) == some_room
    if some_room:
        (tried,) = trials.values()
        assert some.forward_passes - tried / 24 < plain.forward_passes


def test_batches_that_come_in_another_order_or_cut_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = images(), Chain()
    passes = count()

    def turned() -> object:
        batches = list(data.split(6))
        start = next(passes) % 4
        return iter(batches[start:] + batches[:start])

    def cut_otherwise() -> object:
        return iter(data.split(6 + next(passes) % 3))

    for batches in (turned, cut_otherwise):
        plain, kept = both_ways(monkeypatch, model, batches)
        for one, other in zip(plain.layers, kept.layers, strict=True):
            torch.testing.assert_close(one.moments.mean, other.moments.mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(one.moments.m2, other.moments.m2, rtol=1e-5, atol=1e-6)


class Hard(nn.Module):
    """Cuts that a look at the data flow takes for some, and that are none."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.same = nn.Conv2d(3, 4, 3), nn.Identity()
        self.one, self.two, self.three = (nn.BatchNorm2d(4) for _ in range(3))
        self.seen = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.way == "a second name":
            y = self.same(x)
        elif self.way == "numpy":
            y = self.same(x + float(x.detach().numpy().mean()))
        elif self.way == "another device":
            y = self.same(x.to(self.one.weight.device) if x.device.type == "cpu" else x.cpu())
        elif self.way == "state":
            self.seen = tuple(x.shape) if x.is_meta else float(x.detach().numpy().mean())
            y = self.same(x * 1)
        else:
            raise AssertionError(self.way)
        y = self.one(y)
        if self.way == "a second name":
            y = y + x
        elif self.way == "state":
            y = y + (self.seen if isinstance(self.seen, float) else 0.0)
        return self.three(self.two(y.relu()))


@pytest.mark.parametrize("way", ["a second name", "numpy", "another device", "state"])
def test_what_only_looks_like_a_cut_is_not_used(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, kept = both_ways(monkeypatch, Hard(way), list(images().split(8)))
    assert same_bits(plain, kept)


@pytest.mark.parametrize("way", ["takes it", "does not call it", "calls it twice", "looks at numbers"])
def test_batches_that_take_another_way_are_computed_from_their_start(
    way: str, monkeypatch: pytest.MonkeyPatch, trials: dict[restart.Restarts, float]
) -> None:
    class Large(Chain):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2 and way == "looks at numbers":
                x = x + float(x.mean())
            y = self.convs[0](x)
            if len(x) > 2 and way == "does not call it":
                y = nn.functional.conv2d(x, self.convs[0].weight)
            elif len(x) > 2 and way == "calls it twice":
                y = self.convs[0](x + y.mean())
            z = self.convs[1](self.norms[0](nn.functional.silu(y)))
            if len(x) > 2 and way == "takes it":
                z.mul_(y.mean() + 2)  # which PyTorch would let a meta tensor do
            return self.norms[2](self.convs[2](self.norms[1](z)))

    model, batches = Large(), list(images(30).split([2, 6, 2, 10, 10]))
    plain, kept = both_ways(monkeypatch, model, batches)
    assert same_bits(plain, kept)
    (tried,) = trials.values()
    assert kept.forward_passes - tried / 30 <= plain.forward_passes
    assert hooks_of(model) == 0


def test_a_start_in_the_middle_that_fails_counts_as_saved_nothing() -> None:
    def fail(_module: nn.Module, _args: tuple[Tensor]) -> None:
        raise ZeroDivisionError

    model, data = Chain().eval(), images(8)
    flow = trace_flow(model, data, dict(batch_norm_layers(model)))
    restarts = restart.Restarts(model, flow, plan_stages(flow.calls), data)
    with torch.no_grad():
        restarts.aim(0, len(data))
        tried = restarts.saved
        restarts.forward(data)
        assert restarts.saved == tried < 0
        restarts.aim(1, len(data))
        restarts.forward(data)
        saved = restarts.saved
        assert saved == pytest.approx(tried + len(data) * flow.cuts[0].cost)
        with model.convs[2].register_forward_pre_hook(fail), pytest.raises(RestartError):
            restarts.forward(data)
        assert restarts.saved == pytest.approx(saved)
        restarts.forward(data)  # from its beginning, from now on
    assert restarts.saved == pytest.approx(saved)
    restarts.close()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_model_is_the_models_own(error: type[BaseException]) -> None:
    model, calls = Chain(), count()

    def fail(_module: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) == 3 and next(calls) > 0:
            raise error

    handle = model.norms[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        measure_population(model, list(images().split([8, 8, 3, 5])))
    handle.remove()
    assert hooks_of(model) == 0
    assert not torch.is_autocast_enabled("cpu")


def broken(
    self: spill.SpillFile, place: spill.Place, memory: Tensor, move: Callable[[memoryview], int | None]
) -> None:
    raise OSError(errno.ENOSPC, "no space left on device")


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    before = {*threading.enumerate()}  # of other tests
    yield
    assert {*threading.enumerate()} <= before


@pytest.mark.usefixtures("no_thread_is_left")
@pytest.mark.parametrize("network", [Residual, Shared, Twins, Chain, Block])
def test_on_disk_no_bit_changes_either(network: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    plain, kept = both_ways(monkeypatch, model, list(images().split([1, 13, 2, 8])), 0, 2**20)
    assert same_bits(plain, kept)
    if network is Chain:
        assert kept.forward_passes < plain.forward_passes


@pytest.mark.usefixtures("no_thread_is_left")
@pytest.mark.parametrize("num_transfers", [0, 2, 5, 9])
def test_a_disk_that_fills_up_costs_time_only(num_transfers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer, calls, failed = spill.SpillFile._transfer, count(), []

    def failing(
        self: spill.SpillFile, place: spill.Place, memory: Tensor, move: Callable[[memoryview], int | None]
    ) -> None:
        if next(calls) >= num_transfers:
            failed.append(move)
            broken(self, place, memory, move)
        transfer(self, place, memory, move)

    monkeypatch.setattr(spill.SpillFile, "_transfer", failing)
    model = Chain()
    plain, kept = both_ways(monkeypatch, model, list(images().split(4)), 0, 2**20)
    assert failed
    assert same_bits(plain, kept)
    assert hooks_of(model) == 0


def test_without_a_temporary_folder_nothing_is_kept_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "folder", lambda: tmp_path / "none")
    plain, kept = both_ways(monkeypatch, Chain(), list(images().split(4)), 0, 2**20)
    assert same_bits(plain, kept)
    monkeypatch.undo()
    monkeypatch.setattr(spill, "folder", lambda: tmp_path / "none")
    assert spill.usable_bytes() == 0


@pytest.mark.parametrize("disk_bytes", [0, 2**20])
def test_images_are_read_twice_and_no_more_when_all_are_kept(
    disk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    data = list(images().split(4))

    def batches() -> object:
        reads.append(1)
        return iter(data)

    plain, found = both_ways(monkeypatch, Chain(), batches, 0 if disk_bytes else 2**20, disk_bytes)
    assert same_bits(plain, found)
    # the first batch alone, to see what depends on what, before each
    assert len(reads) == (1 + 3) + (1 + 2)


@pytest.mark.usefixtures("no_thread_is_left")
def test_the_disk_is_given_back_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    close, forward = spill.SpillFile.close, restart.Restarts.forward

    def interrupted(self: restart.Restarts, inputs: Tensor) -> None:
        if self._kept._file is not None:
            raise KeyboardInterrupt
        forward(self, inputs)

    def watched(self: spill.SpillFile) -> None:
        close(self)
        closed.append(self._file.closed)

    monkeypatch.setattr(spill.SpillFile, "close", watched)
    monkeypatch.setattr(restart.Restarts, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        both_ways(monkeypatch, Chain(), list(images().split(4)), 0, 2**20)
    assert closed == [True]


def test_a_batch_that_was_lost_is_computed_from_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pass that reads no images, what was kept of the second batch turns out to be gone."""
    lost = []
    replay = restart.Restarts.replay

    def losing(self: restart.Restarts) -> Iterator[Tensor]:
        for number, inputs in enumerate(replay(self)):
            if number == 1 and not lost:
                lost.append(self._kept._entries.pop(self._order[1][0]))
            yield inputs

    monkeypatch.setattr(restart.Restarts, "replay", losing)
    plain, kept = both_ways(monkeypatch, Chain(), list(images().split(4)))
    assert lost
    assert same_bits(plain, kept)
    assert kept.num_passes == plain.num_passes + 1
