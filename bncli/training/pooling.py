"""ReLU behind max pooling instead of before it, in training: the same bits in less memory and less time.

The maximum of ReLU's output is ReLU of the maximum, and the gradients are the same too. So ReLU can wait for
the pooling, where it computes, and keeps for the backward pass, a quarter of the values. PyTorch's pooling
keeps its whole input as well, of which the backward pass needs the shape alone, and an int64 for the place of
each maximum, though the last byte of it says which pixel of its window it is.

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
# bytes of maps that PyTorch's pooling may keep: to make its places bytes and back takes as long as a ReLU
_SMALL = 2**23


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
        if maps.numel() * maps.element_size() <= _SMALL:
            pooled = super().forward(maps)
            return pooled.relu_()
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
        chunk = max(1, _CHUNK_VALUES // maps[0].numel())
        size = nn.functional.max_pool2d(maps[:1].detach(), *window).shape[2:]
        shape = (*maps.shape[:2], *size)
        pooled = torch.empty(shape, dtype=maps.dtype, device=maps.device, memory_format=ctx.layout)
        dtype = _places_type(ctx.window, maps.shape[3])
        # of all images in one block: many small ones would lie scattered among the activations
        places = torch.empty(shape, dtype=dtype, device=maps.device, memory_format=ctx.layout)
        for some, values, theirs in zip(
            maps.split(chunk), pooled.split(chunk), places.split(chunk), strict=True
        ):
            indices = maps.new_empty(0, dtype=torch.int64)  # those of the images before are free by now
            torch.ops.aten.max_pool2d_with_indices.out(
                some, *ctx.window, ctx.ceil_mode, out=values, indices=indices
            )
            theirs.copy_(indices)
        ctx.chunk = chunk
        ctx.save_for_backward(places)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_input = torch.empty(
            ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=ctx.layout
        )
        (places,) = ctx.saved_tensors
        first = _first_places(ctx.window, ctx.shape[3], places)  # (H', W')
        lowest = first.to(places.dtype)
        parts = (each.split(ctx.chunk) for each in (gradient, by_input, places))
        for theirs, result, kept in zip(*parts, strict=True):
            # the input is asked for its shape and layout alone, so the result can stand for it
            torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
                theirs,
                result,
                *ctx.window,
                ctx.ceil_mode,
                (kept - lowest).long().add_(first),
                grad_input=result,
            )
        return by_input, None, None, None, None, None


def _places_type(window: list[tuple[int, int]], width: int) -> torch.dtype:
    """The type that tells the pixels of a window apart, in maps of that width."""
    (high, wide), _, _, (down, across) = window
    last = (high - 1) * down * width + (wide - 1) * across  # counted from the window's first pixel
    return torch.uint8 if last < 2**8 else torch.int32


def _first_places(window: list[tuple[int, int]], width: int, places: Tensor) -> Tensor:
    """Where in its map the first pixel of each window is, (H', W') int64; below 0 for some of the padding."""
    _, strides, paddings, _ = window
    rows, columns = (
        torch.arange(length, device=places.device) * stride - padding
        for length, stride, padding in zip(places.shape[2:], strides, paddings, strict=True)
    )
    return rows[:, None] * width + columns
