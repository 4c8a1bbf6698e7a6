import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from bncli.batchnorm.layers import batch_norm_layers
from bncli.batchnorm.modes import buffers_digest
from bncli.batchnorm.tracking import EpochStatistics, LayerEpoch

RAGGED = [16, 16, 16, 16, 5]


def small_net(**arguments: object) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6, **arguments),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4, **arguments),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


Measured = dict[str, list[tuple[Tensor, Tensor]]]


@contextmanager
def measured_batches(net: nn.Module) -> Iterator[Measured]:
    """The oracle: hooks that measure every input in float64, mean and unbiased variance (C,)."""
    measured: Measured = {name: [] for name, _ in batch_norm_layers(net)}

    def hook_for(name: str):
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0].detach().double()
            measured[name].append((x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)))

        return hook

    handles = [m.register_forward_pre_hook(hook_for(name)) for name, m in batch_norm_layers(net)]
    yield measured
    for handle in handles:
        handle.remove()


def train_epoch(net: nn.Module, sizes: list[int]) -> tuple[LayerEpoch, ...]:
    """Steps that change the weights, on inputs whose distribution drifts."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    epoch = EpochStatistics(net)
    for step, size in enumerate(sizes):
        loss = net(torch.randn(size, 3, 9, 9) * (1 + 0.2 * step) + 0.3 * step).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        epoch.observe()
    return epoch.finish()


@pytest.mark.parametrize("sizes", [[16], [16] * 12, RAGGED])
@pytest.mark.parametrize("momentum", [0.1, 0.4, 1.0, None])
def test_the_batch_statistics_are_those_that_hooks_measure(momentum: float | None, sizes: list[int]) -> None:
    net = small_net(momentum=momentum, eps=0.05)
    train_epoch(net, [16] * 3)  # so that the epoch does not start from (0, 1)
    with measured_batches(net) as measured:
        layers = train_epoch(net, sizes)
    assert [layer.name for layer in layers] == ["1", "4"]
    for layer in layers:
        means, variances = zip(*measured[layer.name], strict=True)
        expected_mean = torch.stack(means).mean(0)
        expected_var = torch.stack(variances).mean(0)
        assert layer.num_batches == len(sizes)
        assert torch.allclose(layer.batch_mean, expected_mean, rtol=2e-5, atol=2e-6)
        assert torch.allclose(layer.batch_var, expected_var, rtol=2e-5, atol=2e-6)

        norm = net.get_submodule(layer.name)
        mean, var = norm.running_mean.double(), norm.running_var.double()
        shift = (((mean - expected_mean) ** 2 / (expected_var + norm.eps)).mean()) ** 0.5
        assert layer.mean_shift_in_batch_deviations == pytest.approx(float(shift), rel=1e-3, abs=1e-5)
        ratio = math.prod(((var + norm.eps) / (expected_var + norm.eps)).tolist())
        assert layer.var_ratio == pytest.approx(ratio ** (1 / len(var)), rel=1e-4)
        assert layer.running_mean_norm == pytest.approx(math.hypot(*mean.tolist()))
        assert layer.running_var_norm == pytest.approx(math.hypot(*var.tolist()))


def test_momentum_1_leaves_the_last_batch_in_the_buffers() -> None:
    net = small_net(momentum=1.0)
    (layer, _) = train_epoch(net, [16])
    assert layer.mean_shift_in_batch_deviations == pytest.approx(0, abs=1e-6)
    assert layer.var_ratio == pytest.approx(1)


def test_observing_changes_no_buffer() -> None:
    net = small_net()
    net(torch.randn(4, 3, 9, 9))
    digest = buffers_digest(net)
    epoch = EpochStatistics(net)
    epoch.observe()
    epoch.finish()
    assert buffers_digest(net) == digest


def batch_values(layer: LayerEpoch) -> set[object]:
    return {layer.batch_mean, layer.batch_var, layer.mean_shift_in_batch_deviations, layer.var_ratio}


def test_momentum_0_hides_the_batches() -> None:
    layer = train_epoch(small_net(momentum=0.0), RAGGED)[0]
    assert batch_values(layer) == {None}
    assert layer.running_var_norm == pytest.approx(6**0.5)


def test_a_layer_without_running_statistics_is_reported_empty() -> None:
    layer = train_epoch(small_net(track_running_stats=False), RAGGED)[0]
    assert batch_values(layer) | {layer.running_mean_norm, layer.running_var_norm} == {None}


def test_no_steps_give_no_batches() -> None:
    for momentum in (0.1, None):
        layer = EpochStatistics(small_net(momentum=momentum)).finish()[0]
        assert batch_values(layer) == {None}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_frozen_in_eval_mode_claims_nothing(momentum: float | None) -> None:
    net = small_net(momentum=momentum)
    net[1].eval()
    frozen, trained = train_epoch(net, RAGGED)
    assert frozen.num_batches == 0
    assert batch_values(frozen) == {None}
    assert trained.batch_mean is not None


def test_a_layer_that_runs_twice_in_a_step_claims_nothing() -> None:
    norm = nn.BatchNorm2d(3)
    layer = train_epoch(nn.Sequential(norm, nn.Conv2d(3, 3, 1), norm), RAGGED)[0]
    assert layer.num_batches == 2 * len(RAGGED)
    assert batch_values(layer) == {None}


def test_a_momentum_that_changes_on_the_way_claims_nothing() -> None:
    net = small_net()
    epoch = EpochStatistics(net)
    for momentum in (0.1, 0.2, 0.1):
        net[1].momentum = momentum
        net(torch.randn(4, 3, 9, 9))
        epoch.observe()
    changed, constant = epoch.finish()
    assert batch_values(changed) == {None}
    assert constant.batch_mean is not None


def test_a_constant_channel_has_variance_0_and_a_finite_ratio() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2, momentum=0.1))
    epoch = EpochStatistics(net)
    for _ in range(40):
        inputs = torch.randn(8, 2, 4, 4)
        inputs[:, 1] = 3.0
        net(inputs)
        epoch.observe()
    (layer,) = epoch.finish()
    assert 0 <= float(layer.batch_var[1]) < 1e-6
    assert 1 < layer.var_ratio < math.inf


def test_nan_batches_show() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2))
    epoch = EpochStatistics(net)
    net(torch.full((8, 2, 4, 4), math.nan))
    epoch.observe()
    (layer,) = epoch.finish()
    assert math.isnan(layer.mean_shift_in_batch_deviations)
    assert math.isnan(layer.var_ratio)


def test_observing_nine_layers_of_256_channels_costs_less_than_a_millisecond() -> None:
    epoch = EpochStatistics(nn.Sequential(*[nn.BatchNorm2d(256) for _ in range(9)]))
    durations = []
    for _ in range(50):
        start = time.perf_counter()
        epoch.observe()
        durations.append(time.perf_counter() - start)
    assert min(durations) < 1e-3  # the smallest: the machine may be busy
