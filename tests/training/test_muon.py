import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from bncli.config import TrainConfig
from bncli.config_file import load_config
from bncli.errors import ConfigError
from bncli.models import build_network
from bncli.training import prepare
from bncli.training.last_good_step import LastGoodStep
from bncli.training.loop import training_step
from bncli.training.optimizer import Optimizer, build_optimizer
from bncli.training.run import Run


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Muon's polynomial, three times, on the singular values in float64 (Jordan 2024)."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ v


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_muon_turns_filters_as_its_definition_says(memory_format: torch.memory_format) -> None:
    convolution = nn.Conv2d(16, 24, 3, bias=False).to(memory_format=memory_format)
    weight = convolution.weight
    group = {"params": [weight], "lr": 0.3, "weight_decay": 0.0, "muon": True}
    optimizer = Optimizer([group], momentum=0.6, nesterov=True)
    momentum = torch.zeros(24, 144, dtype=torch.float64)
    for _ in range(3):
        before = weight.detach().double().flatten(1)
        gradient = torch.randn(24, 16, 3, 3).contiguous(memory_format=memory_format)
        weight.grad = gradient
        optimizer.step()
        momentum = 0.6 * momentum + gradient.double().flatten(1)
        scaled = before * math.sqrt(24) / before.norm()
        wanted = scaled - 0.3 * orthogonalised(gradient.double().flatten(1) + 0.6 * momentum)
        error = (weight.detach().double().flatten(1) - wanted).norm() / (wanted - scaled).norm()
        assert error < 0.02  # the optimiser computes in bfloat16
    assert weight.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", [(24, 16, 3, 3), (64, 3, 3, 3)])  # a wide matrix, and a tall one
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_has_the_bits_of_pytorchs(shape: tuple[int, ...], nesterov: bool) -> None:
    torch.manual_seed(0)
    filters = nn.Parameter(torch.randn(shape).contiguous(memory_format=torch.channels_last))
    group = {"params": [filters], "lr": 0.3, "weight_decay": 0.0, "muon": True}
    ours = Optimizer([group], momentum=0.6, nesterov=nesterov)
    matrix = nn.Parameter(filters.detach().permute(0, 2, 3, 1).flatten(1).clone())
    theirs = torch.optim.Muon([matrix], lr=0.3, weight_decay=0.0, momentum=0.6, nesterov=nesterov, ns_steps=3)
    for _ in range(4):
        filters.grad = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        matrix.grad = filters.grad.permute(0, 2, 3, 1).flatten(1).clone()
        with torch.no_grad():
            matrix.mul_(math.sqrt(len(matrix)) / matrix.norm())
        ours.step()
        theirs.step()  # type: ignore[no-untyped-call]
        assert torch.equal(filters.detach().permute(0, 2, 3, 1).flatten(1), matrix)


def test_every_trained_weight_has_one_optimiser_and_its_own_rate(tiny_config: Path) -> None:
    changes = ["train.optimizer=muon", "train.bias_learning_rate=0.3", "train.head_learning_rate=0.7"]
    setup = prepare(load_config(tiny_config, [*changes, "model.batch_norm.learn_weight=false"]))
    run = Run.start(setup)
    run.set_learning_rate(setup.num_steps // 2)
    share = run.learning_rate / 0.1
    assert 0 < share < 1
    rates = {
        parameter.data_ptr(): (group["muon"], group["lr"] / share, group["weight_decay"])
        for group in run.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in setup.model.named_parameters():
        if name.endswith("norm.weight"):
            assert not parameter.requires_grad
            assert parameter.data_ptr() not in rates
            continue
        is_muon, rate, decay = rates.pop(parameter.data_ptr())
        if name.endswith("conv.weight"):
            assert (is_muon, rate, decay) == (True, pytest.approx(0.1), 0)
        elif name == "head.weight":
            assert (is_muon, rate, decay) == (False, pytest.approx(0.7), 5e-4)
        else:
            assert (is_muon, rate, decay) == (False, pytest.approx(0.3), 0)
    assert not rates


class _PreActivation(nn.Module):
    """A block that normalises before each convolution and adds what it was given to its end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(self.norm1(x).relu())
        return x + self.conv2(self.norm2(y).relu())  # type: ignore[no-any-return]


def test_muon_scales_no_filters_whose_scale_matters() -> None:
    plain_norm = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), plain_norm, nn.ReLU())
    network = nn.Sequential(
        stem, _PreActivation(6), _PreActivation(6), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1), nn.ReLU(),
        nn.Conv2d(5, 4, 1),
    ).double()  # fmt: skip
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    groups = build_optimizer(network, TrainConfig(optimizer="muon")).param_groups
    turned = {weight for group in groups if group["muon"] for weight in group["params"]}
    filters = {name: weight for name, weight in network.named_parameters() if weight.ndim == 4}
    with torch.no_grad():
        expected = network(images)
        for name, weight in filters.items():
            weight.mul_(2)
            is_invariant = torch.allclose(network(images), expected, rtol=1e-3, atol=1e-3)
            weight.div_(2)
            assert (weight in turned) == is_invariant, name
    assert {name for name, weight in filters.items() if weight in turned} == {
        "0.0.weight", "1.conv1.weight", "2.conv1.weight",
    }  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "between",
    [
        nn.Identity(),
        nn.MaxPool2d(2),
        nn.AvgPool2d(3, padding=1),
        nn.ReLU(),
        nn.LeakyReLU(),
        nn.GELU(),
        nn.SiLU(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_lies_between_filters_and_normalization_decides_whether_their_scale_matters(
    between: nn.Module, bias: bool
) -> None:
    convolution = nn.Conv2d(3, 6, 3, bias=bias)
    network = nn.Sequential(convolution, between, nn.BatchNorm2d(6, eps=1e-12)).double()
    if bias:
        nn.init.normal_(convolution.bias)
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    turned = {
        weight
        for group in build_optimizer(
            nn.Sequential(network, nn.Conv2d(6, 2, 1)), TrainConfig(optimizer="muon")
        ).param_groups
        if group["muon"]
        for weight in group["params"]
    }
    with torch.no_grad():
        expected = network(images)
        convolution.weight.mul_(2)
        assert (convolution.weight in turned) == torch.allclose(network(images), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_turned"),
    [
        ("resnet18", 20), ("densenet121", 59), ("googlenet", 59), ("mobilenet_v3_small", 34),
        ("efficientnet_b0", 49), ("shufflenet_v2_x0_5", 56),
    ],
)  # fmt: skip
def test_the_scale_of_turned_filters_matters_nowhere_in_real_networks(name: str, num_turned: int) -> None:
    """In the order in which they compute, which may be another than that of their definition."""
    network = build_network(f"torchvision:{name}").double().train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-15
        if type(module).__name__ in ("Dropout", "StochasticDepth"):
            module.p = 0.0  # type: ignore[assignment]
    groups = build_optimizer(network, TrainConfig(optimizer="muon")).param_groups
    turned = [weight for group in groups if group["muon"] for weight in group["params"]]
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = network(images)
        for weight in turned:
            weight.mul_(2)
        found = network(images)
    assert len(turned) == num_turned
    for one, other in zip(as_tuple(found), as_tuple(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def as_tuple(outputs: object) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)  # type: ignore[return-value]


def test_gradients_of_filters_are_forgotten() -> None:
    convolution = nn.Conv2d(3, 4, 3, bias=False)
    network = nn.Sequential(convolution, nn.BatchNorm2d(4), nn.Linear(4, 2))
    optimizer = build_optimizer(network, TrainConfig(optimizer="muon"))
    convolution.weight.grad = torch.ones_like(convolution.weight)
    optimizer.zero_grad()
    assert convolution.weight.grad is None


def test_the_network_must_fit_the_smaller_images_too(tiny_config: Path) -> None:
    for kind in ("small", "crop"):
        changes = [f"augment.{kind}_epochs=1", f"augment.{kind}_size=3"]
        with pytest.raises(ConfigError, match="3x3 pixels allow 1"):
            prepare(load_config(tiny_config, changes))


@pytest.mark.parametrize("kind", ["sgd", "muon"])
def test_a_first_step_that_is_undone_leaves_no_momentum(tiny_config: Path, kind: str) -> None:
    run = Run.start(prepare(load_config(tiny_config, [f"train.optimizer={kind}"])))
    last_good = LastGoodStep(run)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(ZeroDivisionError), last_good.or_back():
        training_step(run, *next(run.batches()))
        assert run.optimizer.momenta()
        raise ZeroDivisionError
    assert run.optimizer.momenta() == []
    assert all(torch.equal(before[key], value) for key, value in run.model.state_dict().items())
