import copy

import pytest
import torch
from torch import nn

from bncli.config import BatchNormConfig, ModelConfig
from bncli.inference import fold_batch_norm
from bncli.models.convnet import build_model


def with_statistics(model: nn.Module) -> nn.Module:
    """Float64, in eval mode, with statistics, weights and biases that are not their defaults."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3)
            if module.affine:
                nn.init.uniform_(module.weight, 0.3, 2)
                nn.init.normal_(module.bias)
    return model.double().eval()


def num_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("pool_before_norm", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_our_networks_compute_the_same_without_any_batch_norm(
    pool: str, pool_before_norm: bool, affine: bool
) -> None:
    norm = BatchNormConfig(affine=affine, eps=1e-2)
    config = ModelConfig(widths=(6, 8), pool=pool, pool_before_norm=pool_before_norm, batch_norm=norm)
    model = with_statistics(build_model(config, 10, image_size=32))
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model)
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    assert (num_norms(model), num_norms(folded)) == (4, 0)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions_of_any_dimension_and_with_a_bias(dimensions: int, bias: bool) -> None:
    convolution = getattr(nn, f"Conv{dimensions}d")(3, 4, 3, padding=1, stride=2, bias=bias)
    model = with_statistics(nn.Sequential(convolution, getattr(nn, f"BatchNorm{dimensions}d")(4), nn.ReLU()))
    folded = fold_batch_norm(model)
    x = torch.randn(2, 3, *[7] * dimensions, dtype=torch.float64)
    assert num_norms(folded) == 0
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)


def shared() -> nn.Module:
    convolution = nn.Conv2d(3, 3, 1)
    return nn.Sequential(convolution, nn.BatchNorm2d(3), convolution)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    return model


def watched() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[1].register_forward_hook(lambda *_: None)
    return model


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self[1](self[0](x) + x)


@pytest.mark.parametrize(
    "model",
    [
        shared(),
        tied(),
        watched(),
        Residual(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.AvgPool2d(3, padding=1), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.AvgPool2d(2, divisor_override=3), nn.BatchNorm2d(3)),
        nn.Sequential(nn.ConvTranspose2d(3, 3, 1), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    ],
)
def test_what_cannot_be_folded_stays(model: nn.Module) -> None:
    with_statistics(model)
    folded = fold_batch_norm(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert num_norms(folded) == num_norms(model)
    assert torch.equal(folded(x), model(x))


@pytest.mark.parametrize(("smallest", "num_left"), [(-0.1, 1), (0.0, 0)])
def test_max_pooling_is_passed_only_where_the_map_does_not_fall(smallest: float, num_left: int) -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 3, 1), nn.MaxPool2d(2), nn.BatchNorm2d(3)))
    with torch.no_grad():
        model[2].weight[1] = smallest
    folded = fold_batch_norm(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert num_norms(folded) == num_left
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
