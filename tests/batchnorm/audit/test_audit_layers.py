import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from bncli.batchnorm.audit.audit_layers import audit_layers
from bncli.batchnorm.conventions import CONVENTIONS, PYTORCH, Convention
from bncli.batchnorm.layers import LayerStats, read_running_stats


def trained_norm(**arguments: object) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(4, **arguments)
    for _ in range(50):
        norm(torch.randn(8, 4, 5, 5))
    return norm


def read(norm: nn.Module) -> LayerStats:
    return read_running_stats(norm)[0]


def layer_flags(layer: LayerStats) -> tuple[str, ...]:
    return tuple(finding.name for finding in audit_layers((layer,)))


def dead_channels(layer: LayerStats) -> torch.Tensor:
    found = torch.zeros(layer.num_features, dtype=torch.bool)
    for finding in audit_layers((layer,), select=["dead_channel"]):
        found[list(finding.channels)] = True
    return found


def test_a_healthy_trained_layer_has_no_flags_in_either_form() -> None:
    norm = trained_norm()
    assert layer_flags(read(norm)) == ()
    assert layer_flags(read_running_stats(norm.state_dict())[0]) == ()


def test_a_new_layer_was_never_updated() -> None:
    assert layer_flags(read(nn.BatchNorm2d(4))) == ("never_updated",)


def test_a_layer_with_momentum_0_was_never_updated_whatever_its_counter_says() -> None:
    norm = trained_norm(momentum=0.0)
    assert int(norm.num_batches_tracked) == 50
    assert layer_flags(read(norm)) == ("never_updated",)


def test_a_trained_layer_loaded_from_a_checkpoint_without_counter_is_healthy() -> None:
    state = {k: v for k, v in trained_norm().state_dict().items() if k != "num_batches_tracked"}
    norm = nn.BatchNorm2d(4)
    norm.load_state_dict(state)  # PyTorch lets it pass, and leaves the counter at 0
    assert int(norm.num_batches_tracked) == 0
    assert layer_flags(read(norm)) == ()


@pytest.mark.parametrize("key", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_single_non_finite_value_is_found_in_every_tensor(key: str, value: float) -> None:
    norm = trained_norm()
    with torch.no_grad():
        getattr(norm, key)[2] = value
    assert layer_flags(read(norm)) == ("non_finite",)


def test_a_negative_variance_is_not_a_dead_channel() -> None:
    norm = trained_norm()
    norm.running_var[1] = -1e-9
    assert layer_flags(read(norm)) == ("negative_variance",)
    assert not dead_channels(read(norm)).any()


def test_a_layer_without_running_statistics_says_so() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    assert layer_flags(read(norm)) == ("no_running_stats",)


def test_channels_are_dead_by_weight_or_by_variance() -> None:
    norm = trained_norm()
    with torch.no_grad():
        norm.weight[0] = 0.0
        norm.running_var[3] = 0.0
    assert dead_channels(read(norm)).tolist() == [True, False, False, True]
    assert layer_flags(read(norm)) == ("dead_channel",)


@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_a_dead_channel_keeps_less_than_a_tenth_of_a_standard_deviation(eps: float) -> None:
    # the definition by its effect: the standard deviation of eval mode's normalised output
    deviations = torch.tensor([0.05, 0.098, 0.102, 0.5], dtype=torch.float64)
    variances = eps * deviations**2 / (1 - deviations**2)
    norm = trained_norm(eps=eps, affine=False).double().eval()
    norm.running_mean.zero_()
    norm.running_var.copy_(variances)
    inputs = torch.randn(64, 4, 8, 8, dtype=torch.float64)
    inputs = inputs / inputs.std((0, 2, 3), correction=0, keepdim=True) * variances.sqrt()[:, None, None]
    outputs = norm(inputs).std((0, 2, 3), correction=0)
    assert torch.allclose(outputs, deviations)
    assert dead_channels(read(norm)).tolist() == (outputs < 0.1).tolist() == [True, True, False, False]


def test_an_unknown_eps_is_taken_for_pytorchs() -> None:
    norm = trained_norm()
    norm.running_var.copy_(torch.tensor([0.9e-7, 1.1e-7, 1.0, 1.0]))
    (layer,) = read_running_stats(norm.state_dict())
    assert dead_channels(layer).tolist() == [True, False, False, False]


def test_an_eps_of_0_leaves_the_constant_channels() -> None:
    norm = trained_norm()
    norm.eps = 0.0
    norm.running_var.copy_(torch.tensor([0.0, 1e-30, 1.0, 1.0]))
    assert dead_channels(read(norm)).tolist() == [True, False, False, False]


def test_several_flags_keep_their_order() -> None:
    norm = trained_norm()
    norm.running_mean[0] = math.nan
    norm.running_var[1] = -1.0
    norm.running_var[2] = 0.0
    assert layer_flags(read(norm)) == ("non_finite", "negative_variance", "dead_channel")


def test_a_channel_that_is_constant_in_the_data_ends_up_dead() -> None:
    norm = nn.BatchNorm2d(2, momentum=None)
    inputs = torch.randn(8, 2, 4, 4)
    inputs[:, 1] = 5.0
    norm(inputs)
    assert dead_channels(read(norm)).tolist() == [False, True]


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda one: one.framework)
def test_no_advice_names_a_command_that_cannot_write_the_file(convention: Convention) -> None:
    norm = trained_norm()
    norm.running_var[1] = -1
    (finding,) = audit_layers((replace(read(norm), convention=convention),), select=["negative_variance"])
    assert ("(bncli recalibrate)" in finding.advice) == (convention is PYTORCH)
    if convention is not PYTORCH:
        assert "exported from" in finding.advice or f"(in {convention.framework} itself" in finding.advice
