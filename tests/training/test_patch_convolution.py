"""Convolutions whose gradient by the weight is a product of patches, against PyTorch's own gradients."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bncli.training import patch_convolution
from bncli.training.patch_convolution import PatchConv2d, fits_patches, use_patches

FORMATS = (torch.contiguous_format, torch.channels_last)


def twins(*arguments: Any, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Module]:
    """PyTorch's layer, and the same one by patches, each in a network of its own."""
    plain = nn.Sequential(nn.Conv2d(*arguments, **options)).to(dtype)
    ours = copy.deepcopy(plain)
    use_patches(ours, ["0"])
    assert type(ours[0]) is PatchConv2d
    return plain, ours


def gradients(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of its weighted sum by the images and by all weights."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    output = network(images)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    return [output, *torch.autograd.grad((output * weights).sum(), [images, *network.parameters()])]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_gradients_are_pytorchs_over_shapes_strides_paddings_and_formats(
    data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    kernel, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 3), pair(1, 2)
    size = [
        data.draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 9))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    channels, width, num_images = (data.draw(st.integers(1, 5)) for _ in range(3))
    # from one image at a time to all at once
    monkeypatch.setattr(patch_convolution, "_PATCH_BYTES", data.draw(st.sampled_from([1, 3000, 2**20])))
    has_bias, layout = data.draw(st.booleans()), data.draw(st.sampled_from(FORMATS))
    plain, ours = twins(channels, width, kernel, stride, padding, dilation, bias=has_bias)
    images = torch.randn(num_images, channels, *size, dtype=torch.float64).contiguous(memory_format=layout)
    for expected, found in zip(
        gradients(plain.to(memory_format=layout), images),
        gradients(ours.to(memory_format=layout), images),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "dilation": 2, "padding": (0, 2)}])
def test_gradcheck_in_float64(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_convolution, "_PATCH_BYTES", 1)
    _, ours = twins(2, 3, (3, 2), **options)
    images = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)

    def output(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ours, {"0.weight": weight, "0.bias": bias}, images)

    assert torch.autograd.gradcheck(output, (images, *ours.parameters()))


@pytest.mark.parametrize("layout", FORMATS)
def test_in_bfloat16_the_weights_gradient_is_summed_in_float32(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_convolution, "_PATCH_BYTES", 1)  # an image at a time: 64 sums
    plain, ours = twins(8, 16, 3, padding=1, dtype=torch.float32)
    exact = copy.deepcopy(plain).double()
    images = torch.randn(64, 8, 9, 9).bfloat16().float().contiguous(memory_format=layout)
    with torch.no_grad():
        for network in (plain, ours, exact):
            network[0].weight.copy_(network[0].weight.bfloat16())
    found = {}
    for name, network in {"plain": plain, "ours": ours, "exact": exact}.items():
        inputs = images.to(network[0].weight.dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "exact"):
            output = network(inputs)
        output.backward(torch.ones_like(output))
        found[name] = (output.double(), inputs.grad.double(), network[0].weight.grad)
    assert found["ours"][2].dtype == torch.float32
    # what stays PyTorch's has its bits
    assert torch.equal(found["ours"][0], found["plain"][0])
    assert torch.equal(found["ours"][1], found["plain"][1])
    errors = {
        name: float((found[name][2].double() - found["exact"][2]).norm() / found["exact"][2].norm())
        for name in ("plain", "ours")
    }
    assert errors["ours"] < 2 * errors["plain"] + 1e-3


def test_the_bits_are_the_same_every_time() -> None:
    _, ours = twins(16, 32, 3, padding=1, dtype=torch.float32)
    ours = ours.to(memory_format=torch.channels_last)
    images = torch.randn(100, 16, 15, 15).contiguous(memory_format=torch.channels_last)
    first, second = gradients(ours, images), gradients(ours, images)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_gradient_lies_in_memory_as_its_weight() -> None:
    _, ours = twins(4, 6, 3, dtype=torch.float32)
    ours = ours.to(memory_format=torch.channels_last)
    ours(torch.randn(2, 4, 5, 5)).sum().backward()
    assert ours[0].weight.grad.stride() == ours[0].weight.stride()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.LazyConv2d(4, 3),
        nn.Conv1d(4, 4, 3),
    ],
    ids=str,
)
def test_other_layers_stay_pytorchs(layer: nn.Module) -> None:
    assert not fits_patches(layer)
    with pytest.raises(ValueError, match="0 is no convolution that can be computed by patches"):
        use_patches(nn.Sequential(layer), ["0"])
    with pytest.raises(ValueError, match=r"9\.conv is no convolution"):
        use_patches(nn.Sequential(layer), ["9.conv"])


def test_without_gradients_it_is_pytorchs_layer() -> None:
    plain, ours = twins(3, 4, 3, dtype=torch.float32)
    assert list(ours.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(ours(images), plain(images))
    assert torch.equal(ours(images[0]), plain(images[0]))  # an image without a batch
    ours.requires_grad_(False)
    graph = ours(images.requires_grad_()).grad_fn
    assert "PatchConvolution" not in str(graph)


def test_a_copy_computes_its_own_gradients() -> None:
    plain, ours = twins(3, 4, 3)
    copied = copy.deepcopy(ours)
    assert type(copied[0]) is PatchConv2d
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(gradients(copied, images), gradients(plain, images))
    assert ours[0].weight.grad is None


@pytest.mark.slow
def test_distributed_data_parallel_has_its_gradients() -> None:
    plain, ours = twins(3, 4, 3, padding=1, dtype=torch.float32)
    images = torch.randn(4, 3, 6, 6)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(ours)
        parallel(images).square().sum().backward()
    finally:
        dist.destroy_process_group()
    plain(images).square().sum().backward()
    torch.testing.assert_close(ours[0].weight.grad, plain[0].weight.grad)


# of PyTorch's own code
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_compiled_it_has_the_same_gradients() -> None:
    _, ours = twins(3, 4, 3, padding=1, dtype=torch.float32)
    images = torch.randn(4, 3, 6, 6)
    compiled = torch.compile(ours)
    torch.testing.assert_close(gradients(compiled, images), gradients(ours, images))
