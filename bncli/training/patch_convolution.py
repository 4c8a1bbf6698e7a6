"""A convolution in training whose gradient by the weight is a matrix product of patches.

The forward pass and the gradient by the input stay PyTorch's, bit for bit. The gradient by the weight is

    gradient (out, kh*kw*in) = outputs' gradient (rows, out)^T @ patches (rows, kh*kw*in)

with a row for each pixel of the output. Patches are cut for some images at a time, few enough for the cache,
and the products of all of them are added up in float32. So its bits are not those of PyTorch's own gradient;
they are the same from run to run. Patches for convolutions: Chellapilla, Puri and Simard 2006.

A layer becomes one by its class, so that names, weights and hooks stay; it computes as `nn.Conv2d` does
wherever no gradient is asked for, as in evaluation and export.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_PATCH_BYTES = 6 * 2**20  # of a chunk: with its padded images and gradients it fits the caches of a few cores


class PatchConv2d(nn.Conv2d):
    """`nn.Conv2d` in all but the way in which it computes the gradient by its weight."""

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if images.ndim != 4 or not (torch.is_grad_enabled() and weight.requires_grad):
            plain: Tensor = super()._conv_forward(images, weight, bias)
            return plain
        dtype = images.dtype
        if torch.is_autocast_enabled(images.device.type):
            dtype = torch.get_autocast_dtype(images.device.type)
        output: Tensor = _PatchConvolution.apply(  # type: ignore[no-untyped-call]
            images.to(dtype), weight, bias, dtype, self.stride, self.padding, self.dilation
        )
        return output


def fits_patches(layer: nn.Module) -> bool:
    """Whether a layer can become a PatchConv2d: groups, other paddings and subclasses stay as they are."""
    return (
        type(layer) is nn.Conv2d
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def use_patches(model: nn.Module, names: Iterable[str]) -> None:
    """Make the convolutions of these names compute their weights' gradients by patches, in place.

    Raises:
        ValueError: one of them is no such layer.
    """
    layers = dict(model.named_modules())
    for name in names:
        layer = layers.get(name)
        if layer is None or not fits_patches(layer):
            raise ValueError(f"{name} is no convolution that can be computed by patches")
        layer.__class__ = PatchConv2d


def weight_gradient(
    gradient: Tensor,
    images: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """The gradient by the weight (out, in, kh, kw), in float32, or in float64 where the images are.

    `gradient` (N, out, H', W') is that by the output, `images` (N, in, H, W) the input, of one type; both are
    read fastest in channels_last.
    """
    out_channels, in_channels = gradient.shape[1], images.shape[1]
    num_values = kernel_size[0] * kernel_size[1] * in_channels  # of a patch
    patch_bytes = gradient[0, 0].numel() * num_values * images.element_size()
    chunk = max(1, _PATCH_BYTES // max(1, patch_bytes))
    total = images.new_zeros(out_channels, num_values, dtype=torch.promote_types(images.dtype, torch.float32))
    for some, theirs in zip(images.split(chunk), gradient.split(chunk), strict=True):
        rows = _patches(some, kernel_size, stride, padding, dilation, theirs.shape[2:]).reshape(
            -1, num_values
        )
        total += theirs.permute(0, 2, 3, 1).reshape(-1, out_channels).T @ rows
    return total.view(out_channels, *kernel_size, in_channels).permute(0, 3, 1, 2)


def _patches(
    images: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, ...],
) -> Tensor:
    """What each pixel (N, H', W') of an output sees of the padded images, (kh, kw, C): a view of them."""
    (top, left), (height, width) = padding, size
    padded = nn.functional.pad(images, (left, left, top, top)).permute(0, 2, 3, 1).contiguous()
    of_image, of_row, of_pixel, of_channel = padded.stride()
    return padded.as_strided(
        (len(padded), height, width, *kernel_size, padded.shape[3]),
        (
            of_image,
            of_row * stride[0],
            of_pixel * stride[1],
            of_row * dilation[0],
            of_pixel * dilation[1],
            of_channel,
        ),
    )


# opaque to torch.compile, which would otherwise unroll the loop over chunks
@torch.library.custom_op("bncli::weight_gradient", mutates_args=())
def _weight_gradient(
    gradient: Tensor,
    images: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    sizes: list[Any] = [tuple(each) for each in (kernel_size, stride, padding, dilation)]
    return weight_gradient(gradient, images, *sizes)


@_weight_gradient.register_fake
def _(
    gradient: Tensor,
    images: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    dtype = torch.promote_types(images.dtype, torch.float32)
    shape = (gradient.shape[1], *kernel_size, images.shape[1])
    return images.new_empty(shape, dtype=dtype).permute(0, 3, 1, 2)


class _PatchConvolution(torch.autograd.Function):
    """Of images (N, in, H, W) in the type to compute in; weight (out, in, kh, kw) and bias in their own."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        filters = weight.to(dtype)
        ctx.save_for_backward(images, filters)
        ctx.sizes = (stride, padding, dilation)
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        offset = None if bias is None else bias.to(dtype)
        return nn.functional.conv2d(images, filters, offset, stride, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, filters = ctx.saved_tensors
        stride, padding, dilation = ctx.sizes
        by_input = by_weight = by_bias = None
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                by_input = torch.ops.aten.convolution_backward(
                    gradient,
                    images,
                    filters,
                    None,
                    stride,
                    padding,
                    dilation,
                    False,
                    (0, 0),
                    1,
                    (True, False, False),
                )[0]
            if ctx.needs_input_grad[1]:
                kernel_size = filters.shape[2:]
                by_weight = _weight_gradient(gradient, images, kernel_size, stride, padding, dilation)
                by_weight = by_weight.to(ctx.weight_dtype)
            if ctx.needs_input_grad[2]:
                by_bias = gradient.sum((0, 2, 3), dtype=ctx.bias_dtype)
        return by_input, by_weight, by_bias, None, None, None, None
