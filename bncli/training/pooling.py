"""ReLU behind max pooling instead of before it, in training: the same bits in less memory and less time.

The maximum of ReLU's output is ReLU of the maximum, and the gradients are the same too. So ReLU can wait for
the pooling, where it computes, and keeps for the backward pass, a quarter of the values. PyTorch's pooling
keeps its whole input as well, of which the backward pass needs the shape alone, and an int64 for the place of
each maximum, though those in maps of up to 32,768 pixels fit an int16.

Layers become such by their class, so that names and hooks stay. They compute as PyTorch's do wherever no
gradient is asked for, as in evaluation and export.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bncli.models.convnet import ConvBNReLU, ConvNet

# of maps that are pooled at once: few calls, and their int64 places stay in the cache
_CHUNK_VALUES = 2**21


class WaitingReLU(nn.ReLU):
    """ReLU that leaves its work to the MaxPoolReLU2d behind it."""

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, H, W) to the same shape."""
        return maps if _will_go_back(maps) else super().forward(maps)


class MaxPoolReLU2d(nn.MaxPool2d):
    """Max pooling, and the ReLU that stands before it in the network."""

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H', W')."""
        pooled: Tensor
        if not _will_go_back(maps):
            pooled = super().forward(maps)
            return pooled
        window = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        pooled = _MaxPooling.apply(maps, *window)  # type: ignore[no-untyped-call]
        return pooled.relu_()


def pool_before_relu(model: nn.Module) -> None:
    """Let ReLU wait wherever it comes right before max pooling, in place.

    Only in a ConvNet: of other networks it is not known which layers follow each other.
    """
    for stage in model.stages if isinstance(model, ConvNet) else ():
        for block, following in pairwise(stage.children()):
            activation = [*block.children()][-1] if isinstance(block, ConvBNReLU) else None
            if type(activation) is nn.ReLU and type(following) is nn.MaxPool2d:
                activation.__class__, following.__class__ = WaitingReLU, MaxPoolReLU2d


def _will_go_back(maps: Tensor) -> bool:
    return maps.requires_grad and torch.is_grad_enabled()


class _MaxPooling(torch.autograd.Function):
    """Of maps (N, C, H, W); in chunks of images, so that the int64 places of all are never there at once."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, *window: Any) -> Tensor:
        ctx.window = [(each, each) if isinstance(each, int) else each for each in window[:-1]]
        ctx.ceil_mode, ctx.shape = window[-1], maps.shape
        is_channels_last = maps.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if is_channels_last else torch.contiguous_format
        places_type = torch.int16 if maps.shape[2] * maps.shape[3] <= 2**15 else torch.int32
        chunk = max(1, _CHUNK_VALUES // maps[0].numel())
        first, *others = maps.split(chunk)
        values, indices = nn.functional.max_pool2d_with_indices(first, *window)
        places = [indices.to(places_type)]
        shape = (len(maps), *values.shape[1:])
        pooled = torch.empty(shape, dtype=maps.dtype, device=maps.device, memory_format=ctx.layout)
        pooled[:chunk] = values
        for more, values in zip(others, pooled[chunk:].split(chunk) if others else (), strict=True):
            indices = indices.new_empty(0)
            torch.ops.aten.max_pool2d_with_indices.out(
                more, *ctx.window, ctx.ceil_mode, out=values, indices=indices
            )
            places.append(indices.to(places_type))
        ctx.save_for_backward(*places)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_input = torch.empty(
            ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=ctx.layout
        )
        start = 0
        for places in ctx.saved_tensors:
            chunk = slice(start, start + len(places))
            start = chunk.stop
            # the input is asked for its shape and layout alone, so the result can stand for it
            torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
                gradient[chunk],
                by_input[chunk],
                *ctx.window,
                ctx.ceil_mode,
                places.long(),
                grad_input=by_input[chunk],
            )
        return by_input, None, None, None, None, None
