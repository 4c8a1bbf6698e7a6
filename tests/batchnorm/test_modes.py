import math

import pytest
import torch
from torch import nn

from bncli.batchnorm.bits import bitwise_equal
from bncli.batchnorm.modes import buffers_digest, eval_mode, preserved_buffers, train_mode


def net_with_mixed_modes() -> nn.Sequential:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3), nn.Dropout()))
    net[1][0].eval()  # frozen on purpose
    return net


def modes(net: nn.Module) -> list[bool]:
    return [module.training for module in net.modules()]


@pytest.mark.parametrize(("context", "inside"), [(eval_mode, False), (train_mode, True)])
def test_every_module_gets_its_own_mode_back(context: object, inside: bool) -> None:
    net = net_with_mixed_modes()
    before = modes(net)
    assert set(before) == {True, False}
    with context(net):
        assert set(modes(net)) == {inside}
    assert modes(net) == before


@pytest.mark.parametrize("context", [eval_mode, train_mode, preserved_buffers])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_restored_when_the_body_raises(context: object, error: type) -> None:
    net = net_with_mixed_modes()
    before = modes(net)
    digest = buffers_digest(net)
    with pytest.raises(error), preserved_buffers(net), context(net):
        net.train()
        net(torch.randn(4, 3, 5, 5))
        net.train(before[0])
        net[1].train(before[2])
        net[1][0].train(before[3])
        raise error
    assert modes(net) == before
    assert buffers_digest(net) == digest


def test_buffers_are_restored_in_place_and_stay_the_same_objects() -> None:
    net = net_with_mixed_modes()
    net(torch.randn(4, 3, 5, 5))
    objects = dict(net.named_buffers())
    copies = {name: buffer.clone() for name, buffer in objects.items()}
    with pytest.raises(ValueError, match="in the middle"), preserved_buffers(net):
        net(torch.randn(4, 3, 5, 5))
        net[0].running_var.fill_(math.nan)
        assert not torch.equal(objects["0.running_mean"], copies["0.running_mean"])
        raise ValueError("in the middle")
    for name, buffer in net.named_buffers():
        assert buffer is objects[name]
        assert torch.equal(buffer, copies[name])


def test_replaced_removed_and_shared_buffers_are_put_back() -> None:
    net = net_with_mixed_modes()
    net[1][0].running_mean = net[0].running_mean  # shared
    net[1][0].register_buffer("nothing", None)
    shared = net[0].running_mean
    with preserved_buffers(net):
        net[0].running_mean = torch.full((3,), 9.0)
        net[0].running_var = None
        net[1][0].nothing = torch.ones(1)
        shared.add_(1)
    assert net[0].running_mean is net[1][0].running_mean is shared
    assert torch.equal(shared, torch.zeros(3))
    assert torch.equal(net[0].running_var, torch.ones(3))
    assert net[1][0].nothing is None


def test_buffers_that_did_not_change_are_not_written() -> None:
    net = nn.Sequential()
    net.register_buffer("expanded", torch.zeros(1).expand(5))  # PyTorch refuses to write to it
    version = net.expanded._version
    with preserved_buffers(net):
        pass
    assert net.expanded._version == version


def test_nan_bits_and_the_sign_of_zero_survive() -> None:
    net = nn.BatchNorm2d(3)
    bits = torch.tensor([0x7FC00001, -(2**31), 0x7F800001], dtype=torch.int32)  # NaN, -0.0, NaN
    net.running_mean.view(torch.int32).copy_(bits)
    with preserved_buffers(net):
        net.running_mean.zero_()
    assert torch.equal(net.running_mean.view(torch.int32), bits)


def flip_one_bit(net: nn.BatchNorm2d) -> None:
    net.running_var.view(torch.int16 if net.running_var.itemsize == 2 else torch.int32)[1] ^= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_sees_a_single_bit(dtype: torch.dtype) -> None:
    net = nn.BatchNorm2d(3).to(dtype)
    digest = buffers_digest(net)
    assert digest == buffers_digest(net)
    assert len(digest) == 64
    flip_one_bit(net)
    assert buffers_digest(net) != digest
    flip_one_bit(net)
    assert buffers_digest(net) == digest


def test_the_digest_holds_still_for_nan_and_tells_zeros_apart() -> None:
    net = nn.BatchNorm2d(3)
    net.running_mean.fill_(math.nan)
    assert buffers_digest(net) == buffers_digest(net)
    net.running_mean.fill_(0.0)
    positive = buffers_digest(net)
    net.running_mean.fill_(-0.0)
    assert buffers_digest(net) != positive


def one_buffer(name: str, tensor: torch.Tensor, persistent: bool = True) -> nn.Module:
    module = nn.Module()
    module.register_buffer(name, tensor, persistent=persistent)
    return module


def test_the_digest_covers_names_dtypes_shapes_and_non_persistent_buffers() -> None:
    zeros = torch.zeros(4)
    variants = [
        one_buffer("a", zeros),
        one_buffer("b", zeros),
        one_buffer("a", zeros.int()),
        one_buffer("a", zeros.view(2, 2)),
        one_buffer("a", zeros + 1, persistent=False),
    ]
    assert len({buffers_digest(module) for module in variants}) == len(variants)


def test_bitwise_equality_is_about_bits() -> None:
    nan = torch.tensor([math.nan, 1.0])
    assert bitwise_equal(nan, nan.clone())
    assert not bitwise_equal(torch.tensor(0.0), torch.tensor(-0.0))
    assert not bitwise_equal(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not bitwise_equal(torch.zeros(2, 3), torch.zeros(3, 2))
    transposed = torch.randn(3, 4)
    assert bitwise_equal(transposed, transposed.t().contiguous().t())
