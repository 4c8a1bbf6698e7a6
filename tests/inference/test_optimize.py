import copy

import pytest
import torch
from torch import nn

import bncli
from bncli.config import BatchNormConfig, ConvNetConfig
from bncli.determinism import FixedShape
from bncli.errors import BncliError
from bncli.inference import optimize_for_inference
from bncli.models.convnet import build_model
from bncli.torchvision_compat import import_torchvision


def with_statistics(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and weights that are not their defaults."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


def our_network(**keys: object) -> nn.Module:
    config = ConvNetConfig(widths=(8, 16), batch_norm=BatchNormConfig(eps=1e-2), **keys)
    return with_statistics(build_model(config, 10, image_size=32))


def pixels(num_images: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_images, 3, 32, 32), dtype=torch.uint8)


def in_float64(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The oracle: the network itself, as it was, in double precision."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(images)


@pytest.mark.parametrize("whitening", [False, True])
@pytest.mark.parametrize("pool_before_norm", [False, True])
def test_in_float32_the_copy_computes_what_the_network_does(whitening: bool, pool_before_norm: bool) -> None:
    model = our_network(whitening=whitening, pool_before_norm=pool_before_norm, pool="avg")
    images = pixels(7)
    fast = optimize_for_inference(model, dtype=torch.float32, rows=3)  # chunks of 3, 3 and 1
    oracle = in_float64(model, images)
    torch.testing.assert_close(fast(images).double(), oracle, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast(images[2:3]).double(), oracle[2:3], rtol=1e-5, atol=1e-5)


def test_in_bfloat16_logits_are_close_float32_and_mostly_agree_on_the_class() -> None:
    model = our_network()
    images = pixels(200)
    logits = optimize_for_inference(model, dtype=torch.bfloat16, rows=64)(images)
    oracle = in_float64(model, images)
    assert logits.dtype == torch.float32
    assert (logits - oracle).abs().max() < 0.03 * oracle.abs().max()
    assert (logits - oracle).abs().max() > 1e-5 * oracle.abs().max()  # it did compute in bfloat16
    # these images are noise and the network is untrained, so every class is nearly a tie
    assert (logits.argmax(1) == oracle.argmax(1)).float().mean() > 0.9


def test_weights_of_convolutions_are_held_in_bfloat16_and_channels_last_without_batch_norm() -> None:
    fast = optimize_for_inference(our_network(), dtype=torch.bfloat16)
    convolutions = [module for module in fast.modules() if isinstance(module, nn.Conv2d)]
    assert {convolution.weight.dtype for convolution in convolutions} == {torch.bfloat16}
    assert all(one.weight.is_contiguous(memory_format=torch.channels_last) for one in convolutions)
    assert fast.model.head.weight.dtype == torch.float32
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())


@pytest.mark.parametrize("own", [torch.float32, torch.float64, torch.bfloat16])
def test_without_a_type_everything_keeps_its_own(own: torch.dtype) -> None:
    model = our_network().to(own)
    fast = optimize_for_inference(model)
    assert {tensor.dtype for tensor in fast.parameters()} == {own}
    images = pixels(2)
    logits = fast(images)
    assert logits.dtype == model(images).dtype
    tolerance = 0.05 if own == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits.double(), in_float64(model, images), rtol=tolerance, atol=tolerance)


def test_without_a_type_layers_of_two_types_keep_theirs() -> None:
    model = with_statistics(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    )
    model[0].bfloat16()
    model[2] = Widen()
    fast = optimize_for_inference(model)
    assert [one.weight.dtype for one in fast.modules() if isinstance(one, nn.Conv2d)] == [
        torch.bfloat16,
        torch.float32,
    ]
    x = torch.rand(2, 3, 8, 8)
    assert fast(x.bfloat16()).dtype == torch.float32
    assert (
        optimize_for_inference(model, dtype=torch.float64)(x).dtype == torch.bfloat16
    )  # of its first weight


class Widen(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def test_the_original_stays_as_it_was_to_the_last_bit() -> None:
    model = our_network().train()
    before = copy.deepcopy(model.state_dict())
    optimize_for_inference(model)(pixels(2))
    after = model.state_dict()
    assert model.training
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [tensor.dtype for tensor in before.values()] == [tensor.dtype for tensor in after.values()]
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_residual_network_loses_all_its_batch_norm_and_computes_the_same(
    dtype: torch.dtype, tolerance: float
) -> None:
    import_torchvision()
    from torchvision.models import resnet18

    model = with_statistics(resnet18(weights=None, num_classes=10))
    images = torch.rand(3, 3, 32, 32)
    oracle = in_float64(model, images.double())
    fast = optimize_for_inference(model, dtype=dtype, rows=2)
    assert str(fast.folding) == "20 of 20 BatchNorm layers folded"
    found = fast(images)
    assert found.dtype == torch.float32
    assert (found - oracle).abs().max() < tolerance * oracle.abs().max()


def test_a_fixed_shape_around_it_gives_an_image_the_same_bits_alone() -> None:
    fixed = FixedShape(optimize_for_inference(our_network()), rows=16)
    images = pixels(20)
    assert torch.equal(fixed(images)[3:4], fixed(images[3:4]))


def test_it_cannot_be_trained() -> None:
    fast = bncli.optimize_for_inference(our_network())
    assert not any(module.training for module in (*fast.modules(), *fast.eval().modules()))
    with pytest.raises(BncliError, match="eval mode"):
        fast.train()
    assert not fast(pixels(1)).requires_grad


def test_no_images_give_no_rows() -> None:
    assert optimize_for_inference(our_network())(pixels(0)).shape == (0, 10)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="rows"):
        optimize_for_inference(our_network(), rows=0)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        optimize_for_inference(our_network(), dtype=torch.int8)
    with pytest.raises(BncliError, match=r"tensor of 2 rows.*\(72\,\)"):
        optimize_for_inference(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(0)))(torch.rand(2, 1, 8, 8))
