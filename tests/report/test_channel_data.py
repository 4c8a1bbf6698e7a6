"""What a page holds of layers and channels, against the layers themselves."""

import base64
import math

import numpy as np
import pytest
import torch

from bncli.batchnorm import audit_layers
from bncli.report.channel_data import describe_channels, describe_layers, rounded
from tests.report.conftest import layers_of


def unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def test_channels_lie_end_to_end_in_model_order() -> None:
    layers = layers_of({"a": 3, "b": 5})
    found = describe_channels(layers, ())
    assert found["layers"] == [0, 1]
    for leaf in ("running_mean", "running_var", "weight", "bias"):
        expected = np.concatenate([getattr(layer, leaf).numpy() for layer in layers])
        assert np.array_equal(unpack(found[leaf]), expected)


def test_what_is_no_number_stays_so() -> None:
    layers = layers_of({"a": 4}, running_var=[1.0, torch.nan, torch.inf, -torch.inf])
    found = unpack(describe_channels(layers, ())["running_var"])
    assert math.isnan(found[1])
    assert list(found[2:]) == [math.inf, -math.inf]


def test_layers_with_findings_come_first_where_there_is_no_room_for_all() -> None:
    sizes = {f"layer{index}": 10 for index in range(8)}
    layers = list(layers_of(sizes))
    bad = layers_of({"layer5": 10}, running_var=[torch.nan] * 10)[0]
    layers[5] = bad
    found = describe_channels(layers, audit_layers(layers), max_channels=15)
    assert found["layers"] == [5]
    # and one that is too wide does not keep out what comes after it
    wide = [layers_of({"wide": 30})[0], *layers[:2]]
    assert describe_channels(wide, (), max_channels=25)["layers"] == [1, 2]


def test_without_findings_those_come_first_that_stand_out() -> None:
    layers = list(layers_of({f"layer{index}": 10 for index in range(12)}))
    strange = {
        3: {"weight": [100.0] * 10},  # the largest gain
        7: {"running_mean": [50.0] * 10},  # the farthest mean
        9: {"running_var": [0.4] * 10},  # the smallest variance
    }
    for index, values in strange.items():
        layers[index] = layers_of({f"layer{index}": 10}, **values)[0]
    assert describe_channels(layers, (), max_channels=30)["layers"] == [3, 7, 9]
    # and before them those that the page is about
    found = describe_channels(layers, audit_layers(layers), first=["layer11", "layer5"], max_channels=20)
    assert found["layers"] == [5, 11]


def test_the_largest_gain_is_that_of_eval_mode() -> None:
    layers = layers_of({"a": 3}, running_var=[0.25, torch.nan, 4.0], weight=[1.0, 9.0, -6.0])
    columns = describe_layers(layers, ())
    assert columns["gain_max"] == [pytest.approx(6 / math.sqrt(4 + 1e-5), rel=1e-3)]
    assert columns["running_var_max"] == ["NaN"]
    nothing = layers_of({"a": 2}, running_var=[torch.nan, torch.nan])
    assert describe_layers(nothing, ())["gain_max"] == [None]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.23456, 1.235), (-0.000123456, -0.0001235), (math.nan, "NaN"), (-math.inf, "-Infinity"), (None, None)],
)
def test_numbers_are_rounded_to_four_digits(value: float | None, expected: object) -> None:
    assert rounded(value) == expected
