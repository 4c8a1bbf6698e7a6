"""The weights of convolutions and dense layers in PyTorch's order of axes and in other frameworks'.

PyTorch's (out, in, height, width) is Keras' (height, width, in, out), a depthwise one's (in x multiplier, 1,
height, width) is (height, width, in, multiplier), and a linear layer's (out, in) is (in, out). Behind images
that were laid flat, the inputs are (channel, height, width) in PyTorch and (height, width, channel) in Keras.
Flax and Haiku have Keras' axes but for depthwise ones, which are as any in groups: (height, width, 1, out).
PaddlePaddle has PyTorch's, and (in, out) for linear layers.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

KernelLayer = _ConvNd | nn.Linear
Layout = Literal["keras", "jax", "paddle"]


def is_depthwise(module: KernelLayer) -> bool:
    """Whether each channel is convolved by itself."""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels


def is_channels_last(layout: Layout) -> bool:
    """Whether its images, and what was laid flat of them, have the channels as their last axis."""
    return layout != "paddle"


def of_pytorch(
    module: KernelLayer, kernel: Tensor, pixels: int = 1, layout: Layout = "keras"
) -> Tensor | None:
    """A framework's array as the weight of a module; None where it cannot be that.

    `pixels` has each channel of the images that a dense layer is given flat.
    """
    if kernel.dim() != module.weight.dim():
        return None
    if isinstance(module, nn.Linear):
        weight = flat_of_pytorch(kernel, pixels if is_channels_last(layout) else 1).T
    elif layout != "keras":
        if isinstance(module, _ConvTransposeNd):
            return None  # turned around in JAX
        weight = kernel.movedim((-1, -2), (0, 1)) if layout == "jax" else kernel
    else:
        weight = kernel.movedim((-1, -2), (0, 1))  # a transposed one has its two the other way in both
        if is_depthwise(module):
            weight = kernel.movedim((-2, -1), (0, 1)).flatten(0, 1).unsqueeze(1)
    return weight.contiguous() if weight.shape == module.weight.shape else None


def of_keras(module: KernelLayer, pixels: int = 1) -> Tensor:
    """A module's weight as Keras' array; `pixels` as for `of_pytorch`."""
    weight = module.weight.detach()
    if isinstance(module, nn.Linear):
        return flat_of_keras(weight.T, pixels).contiguous()
    if is_depthwise(module):
        split = weight.squeeze(1).unflatten(0, (module.in_channels, -1))
        moved: Tensor = split.movedim((0, 1), (-2, -1))
        return moved.contiguous()
    moved = weight.movedim((0, 1), (-1, -2))
    return moved.contiguous()


def flat_of_pytorch(values: Tensor, pixels: int) -> Tensor:
    """Numbers of flat images along the first axis, from Keras' order to PyTorch's."""
    return values if pixels == 1 else values.unflatten(0, (pixels, -1)).transpose(0, 1).flatten(0, 1)


def flat_of_keras(values: Tensor, pixels: int) -> Tensor:
    """Numbers of flat images along the first axis, from PyTorch's order to Keras'."""
    return values if pixels == 1 else values.unflatten(0, (-1, pixels)).transpose(0, 1).flatten(0, 1)


def is_grouped(module: KernelLayer) -> bool:
    """Whether it is transposed and in groups, which Keras has not."""
    return isinstance(module, _ConvTransposeNd) and module.groups > 1
