"""Errors of folding, layer by layer, beside sums in float64 by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bncli.inference import fold_batch_norm
from bncli.inference.fold_error import carries, fold_errors


def a_pair(gain: float = 1.0) -> nn.Sequential:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )
    for layer in (network[1], network[4]):
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    with torch.no_grad():
        network[4].weight[2] *= gain
    return network.eval()


def by_hand(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """A convolution and BatchNorm in float64: patches times weights, then the formula."""
    patches = nn.functional.unfold(x.double(), 3).transpose(1, 2)  # (N, places, C * 9)
    sums = patches @ conv.weight.double().flatten(1).T + conv.bias.double()
    shape = (len(x), x.shape[2] - 2, x.shape[3] - 2, -1)
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    normal = (sums - norm.running_mean.double()) / deviation
    return (normal * norm.weight.double() + norm.bias.double()).view(shape).permute(0, 3, 1, 2)


@torch.no_grad()
def test_each_error_is_that_of_one_pair_from_its_own_input() -> None:
    network = a_pair()
    folding = fold_batch_norm(network)
    with torch.no_grad():
        folding.model[0].bias += 100  # what comes in is wrong, which is no fault of the second pair
        folding.model[3].bias += 0.5
    x = torch.randn(2, 3, 9, 9)
    first, second = fold_errors(network, folding.model, folding.folded, x)
    given = network[:3](x)
    exact = by_hand(given, network[3], network[4])
    scale = exact.square().mean().sqrt()
    found = (network[3:](given).double() - exact).abs().max() / scale
    assert second.error_unfolded == pytest.approx(float(found), rel=1e-6)
    wrong = (folding.model[3:](given).double() - exact).abs().max() / scale
    assert second.error == pytest.approx(float(wrong), rel=1e-6)
    assert second.error == pytest.approx(0.5 / float(scale), rel=1e-3)
    assert first.error > 10
    assert second.added == second.error - second.error_unfolded


def test_what_folding_adds_in_float32_is_rounding_and_both_networks_stay_as_they_were() -> None:
    network = a_pair()
    folding = fold_batch_norm(network)
    before = copy.deepcopy(network.state_dict()), copy.deepcopy(folding.model.state_dict())
    layers = fold_errors(network, folding.model, folding.folded, torch.randn(4, 3, 9, 9))
    assert [layer.name for layer in layers] == ["1", "4"]
    assert [layer.into for layer in layers] == ["0", "3"]
    assert all(0 < layer.error < 1e-5 for layer in layers)
    assert all(layer.carries for layer in layers)
    for model, state in zip((network, folding.model), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_ahead_behind_twice_and_in_a_chain_are_compared_where_the_last_of_them_ends() -> None:
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    network = nn.Sequential(
        nn.BatchNorm2d(3),
        conv,
        norm,
        nn.ReLU(),
        conv,
        norm,
        nn.MaxPool2d(2),
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 2, 1),
    )
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    folding = fold_batch_norm(network.eval())
    assert len(folding.folded) == 2  # the shared convolution has BatchNorm ahead of it once only
    layers = fold_errors(network, folding.model, folding.folded, torch.randn(4, 3, 8, 8))
    assert all(layer.error < 1e-5 for layer in layers)


def test_the_gain_is_the_steepest_slope_and_a_precision_carries_so_much_of_it() -> None:
    network = a_pair(gain=1e4)
    folding = fold_batch_norm(network)
    x = torch.randn(2, 3, 9, 9)
    _, second = fold_errors(network, folding.model, folding.folded, x, torch.float16)
    slopes = network[4].weight.detach().abs() / (network[4].running_var + network[4].eps).sqrt()
    assert second.gain == pytest.approx(float(slopes.max()), rel=1e-5)
    assert second.gain_per_median == pytest.approx(float(slopes.max() / slopes.median()), rel=1e-5)
    assert not second.carries
    assert carries(second.gain, second.gain_per_median, torch.float32)
    assert carries(1e9, 10.0, torch.float16)  # a whole layer of that scale loses nothing
    assert not carries(30.0, 31.0, torch.bfloat16)
