import math

import pytest
import torch

from bncli.config import ConvNetConfig, TrainConfig
from bncli.models.convnet import build_model
from bncli.training.optimizer import build_optimizer, learning_rate_at


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_almost_zero(decay: str) -> None:
    config = TrainConfig(learning_rate=0.4, warmup=0.25, decay=decay)
    rates = [learning_rate_at(step, 1000, config) for step in range(1000)]
    peak = rates.index(max(rates))
    assert peak in {249, 250}
    assert rates[peak] == pytest.approx(0.4, rel=0.01)
    assert rates[:250] == sorted(rates[:250])
    assert rates[250:] == sorted(rates[250:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert rates[0] == pytest.approx(0.4 * 0.5 / 250)
    half = 0.4 / 2 if decay == "linear" else 0.4 * (1 - math.cos(math.pi / 2)) / 2
    assert rates[625] == pytest.approx(half, rel=0.01)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_a_schedule_may_be_all_decay_or_all_warm_up(warmup: float) -> None:
    config = TrainConfig(learning_rate=1.0, warmup=warmup)
    rates = [learning_rate_at(step, 10, config) for step in range(10)]
    assert rates == pytest.approx([0.05 + 0.1 * k for k in range(10)][:: 1 if warmup else -1])


def test_without_decay_the_rate_stays_at_its_peak() -> None:
    config = TrainConfig(learning_rate=0.3, warmup=0.0, decay="none")
    assert {learning_rate_at(step, 10, config) for step in range(10)} == {0.3}


def test_only_weights_decay_not_batch_norm_and_not_biases() -> None:
    model = build_model(ConvNetConfig(widths=(4, 8)), 10, image_size=32)
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.01, momentum=0.9))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_weight = name.endswith("conv.weight") or name == "head.weight"
        assert decay.pop(id(parameter)) == (0.01 if is_weight else 0.0), name
    assert not decay
    assert optimizer.nesterov


def test_nesterov_without_momentum_is_plain_gradient_descent() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = build_optimizer(model, TrainConfig(momentum=0.0))
    assert not optimizer.nesterov
    model(torch.ones(1, 2)).backward()
    optimizer.step()
    assert optimizer.momenta() == []


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, False)])
def test_sgd_has_the_bits_of_pytorchs(momentum: float, nesterov: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = (build_model(ConvNetConfig(widths=(4, 8)), 10, image_size=32) for _ in range(2))
    config = TrainConfig(learning_rate=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.01)
    optimizer = build_optimizer(ours, config)
    weights = [weight for weight in theirs.parameters() if weight.ndim > 1]
    others = [weight for weight in theirs.parameters() if weight.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.SGD(groups, lr=0.1, momentum=momentum, nesterov=nesterov)
    for _ in range(4):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_momenta_of_another_process_continue_with_the_same_bits() -> None:
    torch.manual_seed(0)
    config = TrainConfig(optimizer="muon")
    models = [build_model(ConvNetConfig(widths=(4, 8)), 10, image_size=32) for _ in range(2)]
    first, second = (build_optimizer(model, config) for model in models)
    for step in range(4):
        if step == 2:
            second.load_momenta(first.state_dict())
            models[1].load_state_dict(models[0].state_dict())
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        first.step()
        if step >= 2:
            second.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
