import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bncli.config import BatchNormConfig, ConvNetConfig
from bncli.errors import ConfigError
from bncli.models.convnet import Normalize, Whitening, build_model, measure_layers, smallest_map

CONFIG = ConvNetConfig(widths=(8, 12), blocks_per_stage=2)


def build(config: ConvNetConfig = CONFIG, image_size: int = 32, seed: int = 0):
    return build_model(config, 10, image_size=image_size, seed=seed)


def by_hand(model, images: torch.Tensor, config: ConvNetConfig) -> torch.Tensor:
    """The same network written out with functions, in eval mode."""
    state = model.state_dict()
    x = (images.float() / 255 - 0.5) / 0.25
    for stage in range(len(config.widths)):
        for block in range(config.blocks_per_stage):
            name = f"stages.{stage}.{block}"
            x = F.conv2d(x, state[f"{name}.conv.weight"], padding=1)
            mean, var = state[f"{name}.norm.running_mean"], state[f"{name}.norm.running_var"]
            is_pooled = block == (0 if config.pool_after == "first" else config.blocks_per_stage - 1)
            pool = {"max": F.max_pool2d, "avg": F.avg_pool2d}[config.pool]
            if is_pooled and config.pool_before_norm:
                x = pool(x, 2)
            x = (x - mean[:, None, None]) / (var[:, None, None] + config.batch_norm.eps).sqrt()
            weight, bias = state[f"{name}.norm.weight"], state[f"{name}.norm.bias"]
            x = x * weight[:, None, None] + bias[:, None, None]
            x = x.clamp(min=0) if config.activation == "relu" else x * (1 + torch.erf(x / 2**0.5)) / 2
            if is_pooled and not config.pool_before_norm:
                x = pool(x, 2)
    x = x.amax((2, 3)) if config.head_pool == "max" else x.mean((2, 3))
    return (x @ state["head.weight"].T + state["head.bias"]) * config.logit_scale


@pytest.mark.parametrize("pool_before_norm", [False, True])
@pytest.mark.parametrize(
    ("pool_after", "activation"), [("first", "relu"), ("last", "relu"), ("first", "gelu")]
)
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_the_network_computes_what_its_description_says(
    pool: str, pool_after: str, activation: str, pool_before_norm: bool
) -> None:
    changes = {"pool": pool, "head_pool": pool, "pool_after": pool_after, "activation": activation}
    config = CONFIG.model_copy(update={**changes, "pool_before_norm": pool_before_norm, "logit_scale": 0.5})
    model = build(config)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    model(images)  # in train mode, so that the running statistics are no longer 0 and 1
    expected = by_hand(model, images, config)
    torch.testing.assert_close(model.eval()(images), expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_takes_every_knob_from_the_configuration() -> None:
    knobs = BatchNormConfig(momentum=None, eps=1e-3, affine=False, track_running_stats=False)
    for module in build(ConvNetConfig(widths=(4,), batch_norm=knobs)).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.momentum, module.eps) == (None, 1e-3)
            assert not module.affine
            assert not module.track_running_stats


def test_a_weight_that_is_not_learned_stays_one() -> None:
    for learn_weight in (True, False):
        norm = (
            build(ConvNetConfig(widths=(4,), batch_norm=BatchNormConfig(learn_weight=learn_weight)))
            .stages[0][0]
            .norm
        )
        assert norm.weight.requires_grad is learn_weight
        assert norm.bias.requires_grad
        assert torch.equal(norm.weight, torch.ones(4))


def test_bytes_and_fractions_of_one_image_give_the_same_logits() -> None:
    model = build().eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model(images), model(images.float() / 255), rtol=1e-4, atol=1e-5)


def test_normalize_gives_zero_mean_and_unit_deviation() -> None:
    images = torch.randint(0, 200, (64, 3, 8, 8), dtype=torch.uint8)
    pixels = images.double() / 255
    mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3), correction=0).tolist()
    normalized = Normalize(mean, std)(images).double()
    torch.testing.assert_close(normalized.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        normalized.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-5
    )


def test_logits_are_float32_under_bfloat16_autocast() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        assert build().eval()(images).dtype == torch.float32


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = build(seed=1), build(seed=1), build(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_images_too_small_for_the_stages_are_refused_with_the_limit() -> None:
    with pytest.raises(ConfigError, match=r"model\.widths: 4 stages .* allow 3"):
        build(ConvNetConfig(widths=(4, 4, 4, 4)), image_size=8)
    build(ConvNetConfig(widths=(4, 4, 4)), image_size=8)


def test_whitened_patches_are_uncorrelated_with_unit_variance() -> None:
    pixels = torch.rand(40, 3, 1, 1) + 0.2 * torch.rand(40, 3, 9, 9)  # neighbours are correlated
    images = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / 0.3
    whiten = Whitening(3)
    whiten.fit(images)
    features = whiten.conv(images).double().transpose(0, 1).reshape(24, -1)
    covariance = features[:12] @ features[:12].T / features.shape[1]
    # the largest directions are whitened; the constant 5e-4 keeps the smallest below 1
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-4
    assert covariance.diag().max() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(features[12:], -features[:12])
    assert not any(parameter.requires_grad for parameter in whiten.parameters())


def test_a_whitened_network_sees_patches_and_keeps_its_filters_in_the_state_dict() -> None:
    config = ConvNetConfig(widths=(8, 8), blocks_per_stage=1, whitening=True)
    model = build(config, image_size=9)
    assert model(torch.zeros(2, 3, 9, 9, dtype=torch.uint8)).shape == (2, 10)
    assert model.state_dict()["whiten.conv.weight"].shape == (24, 3, 2, 2)
    with pytest.raises(ConfigError, match="3x3 pixels allow 1"):
        build(config, image_size=4)


def test_dirac_filters_copy_their_input_channels() -> None:
    model = build(ConvNetConfig(widths=(6, 9), blocks_per_stage=1, init="dirac"))
    convolution = model.stages[1][0].conv  # 6 channels to 9
    x = torch.rand(1, 6, 8, 8)
    torch.testing.assert_close(convolution(x)[:, :6], x)
    assert convolution.weight[6:].abs().sum() > 0


@pytest.mark.parametrize("pool_after", ["first", "last"])
def test_costs_are_those_of_the_formulas(pool_after: str) -> None:
    config = CONFIG.model_copy(update={"pool_after": pool_after})
    layers, flops = measure_layers(build(config), (3, 32, 32))
    costs = {cost.name: cost for cost in layers}
    sides = [32, 16, 16, 8] if pool_after == "first" else [32, 32, 16, 16]
    names = ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]
    for name, side, inputs, outputs in zip(names, sides, [3, 8, 8, 12], [8, 8, 12, 12], strict=True):
        cost = costs[f"{name}.conv"]
        assert cost.flops == 2 * side * side * outputs * inputs * 9
        assert cost.num_parameters == outputs * inputs * 9
        assert cost.output_shape == (outputs, side, side)
        assert costs[f"{name}.norm"].num_parameters == 2 * outputs
    assert costs["head"].flops == 2 * 12 * 10
    assert flops == sum(cost.flops for cost in layers)
    assert sum(cost.num_parameters for cost in costs.values()) == sum(
        parameter.numel() for parameter in build(config).parameters()
    )


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = build().train()
    before = copy.deepcopy(model.state_dict())
    measure_layers(model, (3, 32, 32))
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_smallest_map_tells_which_batches_batch_norm_refuses() -> None:
    model = build(ConvNetConfig(widths=(4, 4, 4), blocks_per_stage=2), image_size=8)
    assert smallest_map(model, (3, 8, 8)) == 1
    one, two = torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(one)
    model(two)
    assert smallest_map(build(), (3, 32, 32)) == 64
