"""Marks that conversions leave, made with plain PyTorch and looked for again."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bncli.batchnorm import LayerStats, read_running_stats
from bncli.batchnorm.conversion import (
    QUANTITIES,
    eps_matters,
    momentum_is_inverted,
    pair_by_values,
    relate,
)


def trained(channels: int = 12, seed: int = 0, name: str = "bn") -> LayerStats:
    """A layer whose numbers are those of no other."""
    torch.manual_seed(seed)
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for _ in range(3):
            layer(torch.randn(8, channels, 3, 3) * torch.rand(channels, 1, 1) + torch.randn(channels, 1, 1))
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    (found,) = read_running_stats(layer)
    return replace(found, name=name)


def reordered(layer: LayerStats, order: torch.Tensor) -> LayerStats:
    return replace(layer, **{name: getattr(layer, name)[order] for name in QUANTITIES})


def test_a_copy_in_every_bit() -> None:
    assert relate(trained(), trained()).kind == "equal"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_copy_that_was_rounded(dtype: torch.dtype) -> None:
    layer = trained()
    rounded = replace(layer, **{name: getattr(layer, name).to(dtype) for name in QUANTITIES})
    found = relate(layer, rounded)
    assert found.kind == "rounded"
    assert 0 < found.largest <= torch.finfo(dtype).eps


@given(values=st.integers(2, 100_000), seed=st.integers(0, 50), swap=st.booleans())
@settings(max_examples=60, deadline=None)
def test_bessels_correction_and_its_n(values: int, seed: int, swap: bool) -> None:
    biased = trained(seed=seed)
    assert biased.running_var is not None
    unbiased = replace(biased, running_var=(biased.running_var.double() * values / (values - 1)).float())
    found = relate(unbiased, biased) if swap else relate(biased, unbiased)
    assert found.kind == "bessel"
    assert found.second_is_unbiased != swap
    assert found.values == pytest.approx(values, rel=values * 3e-7 + 1e-6)


def test_a_factor_that_no_n_explains_is_no_correction() -> None:
    layer = trained()
    assert layer.running_var is not None
    assert relate(layer, replace(layer, running_var=layer.running_var * 2.5)).kind == "different"


def test_variances_that_moved_apart_are_no_correction() -> None:
    layer = trained()
    assert layer.running_var is not None
    factors = torch.linspace(1.001, 1.002, 12)
    assert relate(layer, replace(layer, running_var=layer.running_var * factors)).kind == "different"


def test_mean_and_variance_in_each_others_place() -> None:
    layer = trained()
    swapped = replace(layer, running_mean=layer.running_var, running_var=layer.running_mean)
    assert relate(layer, swapped).kind == "swapped"


@given(order=st.permutations(range(12)), seed=st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_channels_in_another_order(order: list[int], seed: int) -> None:
    layer, places = trained(seed=seed), torch.tensor(order)
    found = relate(layer, reordered(layer, places))
    if order == sorted(order):
        assert found.kind == "equal"
    else:
        assert found.kind == "permuted"
        assert found.order is not None
        assert torch.equal(found.order, places)


def test_a_forgotten_axis_is_named() -> None:
    layer = trained()
    found = relate(layer, reordered(layer, torch.arange(12).reshape(3, 4).T.flatten()))
    assert found.axes == (3, 4)


def test_a_permutation_of_the_statistics_alone_is_none() -> None:
    layer, places = trained(), torch.arange(12).flip(0)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    moved = replace(layer, running_mean=layer.running_mean[places], running_var=layer.running_var[places])
    assert relate(layer, moved).kind == "different"


def test_another_layer_is_different_and_none_at_all_is_unknown() -> None:
    assert relate(trained(seed=1), trained(seed=2)).kind == "different"
    assert relate(trained(), replace(trained(), running_mean=None)).kind == "unknown"


def test_numbers_that_are_none_are_never_a_copy() -> None:
    layer = trained()
    assert layer.running_mean is not None
    assert layer.running_var is not None
    broken = replace(layer, running_mean=layer.running_mean * torch.nan)
    assert relate(layer, broken).kind == "different"
    assert relate(layer, replace(layer, running_var=layer.running_var * torch.inf)).kind == "different"


def test_layers_are_paired_by_their_values_whatever_they_are_called() -> None:
    first = [trained(4, seed, f"a{seed}") for seed in range(6)]
    second = [replace(layer, name=f"b{layer.name}") for layer in first if layer.name != "a3"]
    second.insert(1, trained(4, 77, "alien"))
    pairs = [(one.name, two.name) for one, two in pair_by_values(first, second)]
    assert pairs == [(f"a{n}", f"ba{n}") for n in (0, 1, 2, 4, 5)]


def test_what_another_eps_does() -> None:
    layer = trained()
    assert layer.running_var is not None
    first, second = replace(layer, eps=1e-3), replace(layer, eps=1e-5)
    inputs = torch.randn(64, 12, dtype=torch.float64)
    outputs = [inputs / (layer.running_var.double() + eps).sqrt() for eps in (1e-3, 1e-5)]
    assert eps_matters(first, second) == pytest.approx(float((outputs[1] / outputs[0] - 1).abs().max()))
    assert eps_matters(second, first) == pytest.approx(float((outputs[0] / outputs[1] - 1).abs().max()))
    assert eps_matters(first, first) is None


def test_a_momentum_that_was_taken_over_unconverted() -> None:
    layer = trained()
    assert momentum_is_inverted(replace(layer, momentum=0.01), replace(layer, momentum=0.99))
    assert not momentum_is_inverted(replace(layer, momentum=0.01), replace(layer, momentum=0.1))
    assert not momentum_is_inverted(replace(layer, momentum=0.5), replace(layer, momentum=0.5))
    unknown = replace(layer, momentum=0.99, hyperparameters_known=False)
    assert not momentum_is_inverted(replace(layer, momentum=0.01), unknown)
