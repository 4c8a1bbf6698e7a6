import math

import pytest
import torch
from torch import Tensor, nn

from bncli.batchnorm import (
    apply_population,
    buffers_digest,
    measure_population,
    recalibrate,
    verify_fixed_point,
)
from bncli.errors import BncliError


def trained(num_batches: int, momentum: float | None) -> tuple[nn.BatchNorm1d, list[Tensor]]:
    layer = nn.BatchNorm1d(3, momentum=momentum).train()
    batches = [torch.randn(20, 3) * 3 + 5] * num_batches
    for batch in batches:
        layer(batch)
    return layer, batches


@pytest.mark.parametrize("momentum", [0.1, 0.001, 0.4, 1.0])
def test_debias_finds_the_batches_behind_a_short_average(momentum: float) -> None:
    layer, batches = trained(3, momentum)
    result = recalibrate(layer, method="debias")
    torch.testing.assert_close(layer.running_mean, batches[0].mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.running_var, batches[0].var(0), rtol=2e-4, atol=1e-4)
    assert (result.method, result.num_images, result.forward_passes) == ("debias", 0, 0.0)
    assert result.layers[0].standard_error is None
    assert layer.num_batches_tracked == 3


def test_debias_averages_different_batches_by_their_weight() -> None:
    layer = nn.BatchNorm1d(2, momentum=0.25).double().train()
    one, two = torch.randn(9, 2).double(), torch.randn(7, 2).double() + 3
    layer(one), layer(two)
    recalibrate(layer, method="debias")
    expected = (0.75 * one.mean(0) + two.mean(0)) / 1.75
    torch.testing.assert_close(layer.running_mean, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        layer.running_var, (0.75 * one.var(0) + two.var(0)) / 1.75, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("momentum", "num_batches", "reason"),
    [(None, 5, "cumulative"), (0.1, 0, "nothing but its start"), (0.0, 5, "nothing but its start")],
)
def test_debias_leaves_alone_what_it_cannot_know(
    momentum: float | None, num_batches: int, reason: str
) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), trained(2, 0.1)[0])
    model[1].train()
    model[0].momentum = momentum
    model[0].num_batches_tracked.fill_(num_batches)
    digest = buffers_digest(model[0])
    result = recalibrate(model, method="debias")
    assert [one.name for one in result.layers] == ["1"]
    assert reason in result.skipped[0].reason
    assert buffers_digest(model[0]) == digest
    with pytest.raises(BncliError, match=reason):
        recalibrate(model[0], method="debias")


def test_debias_refuses_a_layer_that_did_not_start_at_variance_1() -> None:
    layer = nn.BatchNorm1d(3, momentum=0.1)
    layer.num_batches_tracked.fill_(2)
    layer.running_var.fill_(0.5)  # less than what is left of the start, 0.81
    with pytest.raises(BncliError, match="a variance would be negative"):
        recalibrate(layer, method="debias")
    layer.running_var.fill_(0.81 + 1e-3)
    recalibrate(layer, method="debias")
    assert layer.running_var.tolist() == pytest.approx([1e-3 / 0.19] * 3, rel=1e-3)
    layer.num_batches_tracked = None
    with pytest.raises(BncliError, match="how many batches"):
        recalibrate(layer, method="debias")


def test_how_far_a_layer_moved_is_told_in_new_deviations() -> None:
    layer = nn.BatchNorm1d(2, eps=0.5)
    layer.running_mean.copy_(torch.tensor([1.0, -2.0]))
    layer.running_var.copy_(torch.tensor([7.5, 0.5]))
    data = torch.tensor([[1.0, 10.0], [-1.0, 14.0], [1.0, 10.0], [-1.0, 14.0]])  # mean 0, 12; variance 1, 4
    (consistency,) = verify_fixed_point(layer, [data])
    result = recalibrate(nn.Sequential(layer), data.split(1))
    (change,) = result.layers
    expected = math.sqrt((1 / 1.5 + 14**2 / 4.5) / 2)
    assert change.mean_shift_in_new_deviations == pytest.approx(expected)
    assert consistency.mean_shift_in_input_deviations == change.mean_shift_in_new_deviations
    assert change.var_ratio == consistency.var_ratio == pytest.approx(math.sqrt(8 / 1.5 * 1 / 4.5))
    assert consistency.max_relative_error == pytest.approx(6.5 / 1.5)
    assert consistency.num_values == change.num_values == 4
    # four single images as clusters: n/(n-1) * sum d**2 / n**2 = variance / 3
    assert change.standard_error == pytest.approx(math.sqrt((1 / 3 / 1.5 + 4 / 3 / 4.5) / 2))
    assert change.var_standard_error == pytest.approx(0, abs=1e-12)  # every value is one deviation away
    assert layer.running_var.tolist() == [1.0, 4.0]
    assert recalibrate(layer, [data]).layers[0].standard_error is None


def test_the_largest_error_of_a_mean_is_relative_to_a_large_mean_and_else_to_the_deviation() -> None:
    data = torch.tensor([[99.0, -1.0], [101.0, 1.0]])
    layer = nn.BatchNorm1d(2, eps=0.0)
    layer.running_mean.copy_(torch.tensor([101.0, 0.0]))
    layer.running_var.fill_(1.0)
    assert verify_fixed_point(layer, [data])[0].max_relative_error == pytest.approx(0.01)
    layer.running_mean.copy_(torch.tensor([100.0, 0.25]))
    assert verify_fixed_point(layer, [data])[0].max_relative_error == pytest.approx(0.25)


def test_negative_statistics_have_no_ratio() -> None:
    layer = nn.BatchNorm1d(2)
    layer.running_var.fill_(-31.9)
    assert math.isnan(recalibrate(layer, [torch.randn(8, 2)]).layers[0].var_ratio)


@pytest.mark.parametrize("method", ["exact", "precise"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_before_anything_is_written(method: str, bad: float) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    data = torch.randn(8, 2)
    data[3, 1] = bad
    digest = buffers_digest(model)
    assert measure_population(model, [data], method=method).layers[0].moments.variance().isnan()[1]
    with pytest.raises(BncliError, match="0 sees values that are not finite"):
        recalibrate(model, [data], method=method)
    assert buffers_digest(model) == digest


def test_what_overflows_a_half_precision_buffer_is_refused() -> None:
    layer = nn.BatchNorm1d(1).half()
    with pytest.raises(BncliError, match=r"too large for its torch\.float16"):
        recalibrate(layer, [torch.tensor([[-300.0], [300.0]]).half()])


def test_a_population_of_another_model_is_refused() -> None:
    population = measure_population(nn.Sequential(nn.BatchNorm1d(2)), [torch.randn(8, 2)])
    for other in (nn.Sequential(nn.BatchNorm1d(3)), nn.BatchNorm1d(2)):
        with pytest.raises(BncliError, match="of another model"):
            apply_population(other, population)
    with pytest.raises(BncliError, match="needs batches"):
        recalibrate(nn.BatchNorm1d(2))
