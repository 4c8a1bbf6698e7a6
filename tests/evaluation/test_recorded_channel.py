"""What enters one channel, against the same network computed by hand."""

import pytest
import torch
from torch import nn

from bncli.errors import BncliError
from bncli.evaluation import record_channel


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))


def batches() -> list[torch.Tensor]:
    return list(torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(4))


def test_images_are_described_as_they_enter_the_layer() -> None:
    model = network()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = record_channel(model, batches(), "3", channel=2)
    with torch.no_grad():
        entering = model.eval()[:3](torch.cat(batches()))[:, 2].double().flatten(1)
    assert found.num_positions == 36
    torch.testing.assert_close(found.means, entering.mean(1))
    torch.testing.assert_close(found.variances, entering.var(1, correction=0))
    assert all(value in row for value, row in zip(found.values, entering, strict=True))
    assert found.population_mean == pytest.approx(float(entering.mean()))
    assert found.population_variance == pytest.approx(float(entering.var(correction=0)))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not model[3]._forward_pre_hooks


def test_the_channel_whose_running_statistics_are_farthest_is_taken() -> None:
    model = network()
    model[1].running_var[3] = 1e4
    assert record_channel(model, batches(), "1").channel == 3
    assert record_channel(model, batches(), "1").running_var == pytest.approx(1e4)
    model[1].running_var[2] = torch.nan  # no number at all is farther still
    assert record_channel(model, batches(), "1").channel == 2
    assert record_channel(model, batches(), "3").channel != 2  # behind it, where nothing but NaN enters


def test_vectors_have_one_value_each() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    inputs = torch.randn(7, 3)
    found = record_channel(model, [inputs], "0", channel=1)
    assert found.num_positions == 1
    torch.testing.assert_close(found.values, inputs[:, 1].double())
    assert not found.variances.any()


def test_a_layer_that_is_not_there_or_not_reached_is_an_error() -> None:
    model = network()
    with pytest.raises(BncliError, match="no BatchNorm layer 'x'"):
        record_channel(model, batches(), "x")
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(BncliError, match="no BatchNorm layer '0' with running"):
        record_channel(model, batches(), "0")
