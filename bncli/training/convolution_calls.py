"""What the convolutions of a network are asked for in a training step: sizes, types and which gradients."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bncli.runtime import Runtime


@dataclass(frozen=True)
class ConvolutionCall:
    """One call of a two-dimensional convolution in the forward pass of a part of a batch."""

    name: str
    input_shape: tuple[int, int, int, int]  # (N, in, H, W)
    output_size: tuple[int, int]  # (H', W')
    weight_shape: tuple[int, int, int, int]  # (out, in / groups, kh, kw)
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    dtype: torch.dtype  # in which it is computed
    needs_input_gradient: bool
    needs_weight_gradient: bool

    @property
    def flops(self) -> int:
        """Of each of its products; a multiplication and an addition count as two."""
        out_channels, *patch = self.weight_shape
        return 2 * self.num_pixels * out_channels * patch[0] * patch[1] * patch[2]

    @property
    def num_pixels(self) -> int:
        """Of the outputs of all images."""
        return self.input_shape[0] * self.output_size[0] * self.output_size[1]

    def backward(self, gradient: Tensor, images: Tensor, weight: Tensor, *, by_input: bool = False) -> Tensor:
        """PyTorch's gradient by the weight alone, or by the input alone."""
        found = torch.ops.aten.convolution_backward(
            gradient,
            images,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            (0, 0),
            self.groups,
            (by_input, not by_input, False),
        )
        result: Tensor = found[0] if by_input else found[1]
        return result

    def draw(self, device: torch.device, memory_format: torch.memory_format) -> tuple[Tensor, ...]:
        """Random images, weight and gradient by the output of these sizes."""
        rng = torch.Generator().manual_seed(0)
        output_shape = (self.input_shape[0], self.weight_shape[0], *self.output_size)
        drawn = (
            torch.randn(shape, generator=rng) for shape in (self.input_shape, self.weight_shape, output_shape)
        )
        return tuple(each.to(device, self.dtype, memory_format=memory_format) for each in drawn)


def convolution_calls(model: nn.Module, images: Tensor, runtime: Runtime) -> list[ConvolutionCall]:
    """The calls, in their order, of a forward pass of a copy of the network on images (N, 3, H, W).

    Left out are those on other than four dimensions, and with other padding than zeros.
    """
    found: list[ConvolutionCall] = []
    twin = copy.deepcopy(model).train()

    def note(name: str, layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.ndim == 4 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            batch, channels, height, width = inputs[0].shape
            call = ConvolutionCall(
                name,
                (batch, channels, height, width),
                (output.shape[2], output.shape[3]),
                _sizes(layer.weight.shape),
                _sizes(layer.stride),
                _sizes(layer.padding),
                _sizes(layer.dilation),
                layer.groups,
                output.dtype,
                needs_input_gradient=inputs[0].requires_grad,
                needs_weight_gradient=layer.weight.requires_grad,
            )
            found.append(call)

    for name, layer in _convolutions(twin):
        layer.register_forward_hook(
            lambda layer, inputs, output, name=name: note(name, layer, inputs, output)
        )
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices), runtime.autocast():  # such as dropout draws
        twin(runtime.place(images))
    return found


def _sizes(values: Iterable[int]) -> Any:
    """A tuple of as many as the field wants: PyTorch's annotations do not say."""
    return tuple(values)


def _convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
