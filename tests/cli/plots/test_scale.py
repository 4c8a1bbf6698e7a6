import math

import numpy as np
import pytest
import torch

from bncli.cli.plots.heat_map import NO_NUMBER, make_heat_map
from bncli.cli.plots.rows import make_column
from bncli.cli.plots.scale import Scale, choose_scale


def heavy_tailed(kind: str, size: int = 20_000) -> torch.Tensor:
    """Numbers for which the largest says nothing about the others."""
    random = np.random.default_rng(0)
    numbers = {
        "Cauchy": random.standard_cauchy(size),
        "half zeros, half spread": np.where(np.arange(size) % 2, random.normal(size=size), 0.0),
        "mixture": random.normal(size=size) * 10.0 ** random.integers(-9, 4, size),
        "one far out": np.append(random.normal(size=size - 1), 1e9),
        "2 % far out": np.where(np.arange(size) % 50, random.normal(size=size), 1e6),
    }[kind]
    return torch.from_numpy(numbers)


KINDS = ["Cauchy", "half zeros, half spread", "mixture", "one far out", "2 % far out"]


def share_beyond(places: torch.Tensor, scale: Scale) -> float:
    """By counting, with NumPy."""
    numbers = places.numpy()
    return float(((numbers < scale.low) | (numbers > scale.high)).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("middle", [None, 0.0])
def test_at_most_one_per_cent_lies_beyond_and_is_counted(kind: str, middle: float | None) -> None:
    numbers = heavy_tailed(kind)
    scale = choose_scale(numbers, middle=middle)
    share = share_beyond(scale.place(numbers), scale)
    assert share <= 0.01
    assert scale.num_below + scale.num_above == round(share * len(numbers))
    assert (scale.smallest, scale.largest) == (float(numbers.min()), float(numbers.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_neither_too_many_channels_nor_too_many_cells_of_a_map_lie_beyond(kind: str) -> None:
    numbers = heavy_tailed(kind, 17_056)
    layers = [*numbers[:320].split(16), *numbers[320:].split(1240)]
    for log in (False, True):
        given = [layer.abs() + 1e-30 for layer in layers] if log else layers
        drawn = make_heat_map("", "", given, log=log, middle=None if log else 0.0)
        assert share_beyond(drawn.scale.place(torch.cat(given)), drawn.scale) <= 0.01
        assert share_beyond(drawn.places, drawn.scale) <= 0.01
        num_beyond = drawn.scale.num_below + drawn.scale.num_above
        assert len(drawn.meanings) == bool(drawn.scale.num_below) + bool(drawn.scale.num_above)
        assert (num_beyond > 0) == (len(drawn.meanings) > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_typical_values_are_told_apart(kind: str) -> None:
    """The middle half of what is not 0 takes a visible part of the scale, however far out the others are."""
    numbers = heavy_tailed(kind)
    moved = numbers[numbers != 0]
    scale = choose_scale(numbers, middle=0.0)
    low, high = scale.place(moved.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))).tolist()
    assert high - low > 0.01 * (scale.high - scale.low)


def test_a_layer_that_explodes_stays_on_the_scale_and_leaves_room_for_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(64, generator=generator).double() * size for size in (1, 1e12, 1)]
    column = make_column("", "", layers, neutral=0.0)
    assert column.scale.kind == "symlog"
    assert "logarithmic beyond ±1" in column.label
    assert column.scale.num_below + column.scale.num_above <= 2
    for layer in (0, 2):
        places = column.scale.place(layers[layer])
        assert float(places.max() - places.min()) > 0.05 * (column.scale.high - column.scale.low)


def test_a_few_dead_channels_do_not_flatten_the_variances_and_are_named() -> None:
    variances = torch.ones(1000).double().uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    variances[:3] = 1e-30
    column = make_column("", "", [variances], log=True)
    assert column.scale.low > math.log10(0.4)
    below = int((column.scale.place(variances) < column.scale.low).sum())
    assert 3 <= below <= 5  # half a per cent of them
    assert column.label == f"{below} channels below the scale, to 1e\N{MINUS SIGN}30"


def test_equal_places_have_equal_distances() -> None:
    numbers = torch.tensor([-100.0, -10, -1, 0, 1, 10, 100], dtype=torch.float64)
    assert Scale("symlog", -3, 3, 1.0).place(numbers).tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert Scale("log", 0, 2).place(numbers[4:]).tolist() == [0, 1, 2]
    assert Scale("linear", 0, 2).place(numbers).tolist() == numbers.tolist()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("low", [0.0, 1e-300, 1e-45, 1.0, 999.9, 1e38, 1.7e308])
@pytest.mark.parametrize("factor", [1.0, 1 + 1e-12, 1.1, 3.0, 1e3, 1e20, math.inf])
def test_every_scale_has_ticks_that_say_where_they_stand(log: bool, low: float, factor: float) -> None:
    numbers = torch.tensor([low, low * factor], dtype=torch.float64)
    scale = choose_scale(numbers, log=log)
    assert scale.low < scale.high
    ticks = scale.ticks()
    assert ticks or scale.high - scale.low < 1e-3 * abs(scale.high)
    assert len(set(ticks.values())) == len(ticks)
    for place, text in ticks.items():
        value = torch.tensor(float(text.replace("\N{MINUS SIGN}", "-")), dtype=torch.float64)
        assert math.isclose(float(scale.place(value)), place, rel_tol=1e-5, abs_tol=1e-12)


def test_what_is_no_number_has_no_place_and_is_named() -> None:
    layers = [torch.tensor([1.0, math.nan, math.inf, -1.0, 0.0]), None, torch.zeros(0)]
    drawn = make_heat_map("", "", layers, log=True)
    assert drawn.meanings[NO_NUMBER] == "not finite, or a variance ≤ 0"
    assert drawn.missing == [1]
    assert drawn.places[0].isnan().double().mean() == pytest.approx(0.8, abs=0.01)
