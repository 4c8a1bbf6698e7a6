"""Networks that torch.compile has compiled: its code leaves out hooks that came later, ours among them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bncli.batchnorm import measure_population, recalibrate, verify_fixed_point
from bncli.batchnorm.modes import eval_mode
from bncli.determinism.layer_trace import Seat, first_differing_layer
from bncli.distributed.wrapped import as_written, unwrapped
from bncli.evaluation.recorded_channel import record_channel
from tests.batchnorm.networks import Residual

pytestmark = pytest.mark.slow  # to import the compiler takes seconds


def images() -> list[Tensor]:
    return list(torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(5))


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def in_part(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Conv2d):
            module.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [whole, in_place, in_part])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_compiled_network_is_measured_as_the_same_one_that_is_not(
    compiled: Callable[[nn.Module], nn.Module], mode: str
) -> None:
    torch.manual_seed(0)
    plain = Residual()
    copy = Residual()
    copy.load_state_dict(plain.state_dict())
    model = compiled(copy).train(mode == "train")
    with torch.no_grad():
        model(images()[0])  # from here on there is compiled code
    copy.load_state_dict(plain.state_dict())
    for method in ("precise", "exact"):
        expected = measure_population(plain, images(), method=method)
        found = measure_population(model, images(), method=method)
        assert [one.name for one in found.layers] == [one.name for one in expected.layers]  # no "_orig_mod."
        for one, other in zip(found.layers, expected.layers, strict=True):
            assert torch.equal(one.moments.mean, other.moments.mean)
            assert torch.equal(one.moments.m2, other.moments.m2)
    assert recalibrate(model, images()).layers == recalibrate(plain, images()).layers
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in copy.state_dict().items())
    assert verify_fixed_point(model, images()) == verify_fixed_point(plain, images())


def test_the_layer_that_mixes_the_images_of_a_batch_is_found_in_it() -> None:
    mixing = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), mixing, nn.Flatten(), nn.Linear(144, 2)).eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images()[0])
    first, second = images()[:2]
    seats = Seat(first, 0), Seat(torch.cat([first[:1], second[1:]]), 0)
    assert first_differing_layer(compiled, *seats) == first_differing_layer(model, *seats) == "2"


def test_a_channel_of_it_is_recorded() -> None:
    model = Residual().eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images()[0])
    found, expected = (record_channel(one, images(), "bn2") for one in (compiled, model))
    assert torch.equal(found.values, expected.values)


def test_what_is_inside_both_wrappers_is_found() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = Residual()
        both = torch.compile(DistributedDataParallel(model), backend="eager")
        assert unwrapped(both) is model
        inner = torch.compile(model, backend="eager")
        assert unwrapped(DistributedDataParallel(inner)) is inner
        assert as_written(DistributedDataParallel(inner)) is model
        assert unwrapped(inner) is inner
        with eval_mode(inner):
            assert not model.training
    finally:
        torch.distributed.destroy_process_group()
