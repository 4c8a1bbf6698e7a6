"""The network: Conv-BN-ReLU blocks in stages, small enough to read in a minute.

    images (N, 3, H, W) -> normalize -> (whiten) -> stage 0 -> stage 1 -> ... -> global pooling -> linear

Each stage has one width; the first (or last) of its blocks is followed by 2x2 pooling, so every stage
halves height and width. Pooling after the first block is cheaper: the others run on a quarter of the
pixels. Cheaper still is pooling between convolution and BatchNorm. Convolutions have no bias, since the
BatchNorm that follows would subtract it again.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.config import BatchNormConfig, ConvNetConfig
from bncli.errors import ConfigError

POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": functools.partial(nn.ReLU, inplace=True),
    "gelu": nn.GELU,
}
HEAD_POOLS = {"max": nn.AdaptiveMaxPool2d, "avg": nn.AdaptiveAvgPool2d}


class Normalize(nn.Module):
    """Images to zero mean and unit deviation per channel, so that the network takes raw pixels.

    Input (N, C, H, W): uint8 in 0..255, or floating point in 0..1, as torchvision means them. `mean` and
    `std`, (C,), are in units of the full range (0..1). They are no part of the state dict: a checkpoint
    holds them under `normalization`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to the same shape, in float32 (or in the images' floating point type)."""
        unit = 1.0 if images.is_floating_point() else 255.0
        images = images if images.is_floating_point() else images.to(self.mean.dtype)
        return (images - self.mean * unit) / (self.std * unit)


class ConvBNReLU(nn.Sequential):
    """3x3 convolution, BatchNorm, ReLU (or GELU): (N, C, H, W) to (N, width, H, W).

    With `pool`, what comes out of the convolution is pooled first, to (N, width, H // 2, W // 2).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        batch_norm: BatchNormConfig,
        *,
        activation: str = "relu",
        pool: str | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        if pool is not None:
            self.pool = POOLS[pool](2)
        self.norm = nn.BatchNorm2d(
            out_channels,
            eps=batch_norm.eps,
            momentum=batch_norm.momentum,
            affine=batch_norm.affine,
            track_running_stats=batch_norm.track_running_stats,
        )
        if self.norm.affine:
            self.norm.weight.requires_grad_(batch_norm.learn_weight)
        self.add_module(activation, ACTIVATIONS[activation]())


class Whitening(nn.Sequential):
    """2x2 patches to uncorrelated features of unit variance: (N, C, H, W) to (N, 8C, H-1, W-1).

    Then comes ReLU (or GELU). The filters are the eigenvectors of the patches' covariance, each divided by
    the root of its eigenvalue, once with either sign, so that ReLU loses nothing. `fit` computes them from
    images; they are not trained. It gives the first layer what it would take several epochs to learn (Page
    2018, "How to train your ResNet"; Jordan 2024, arXiv 2404.00498).
    """

    def __init__(self, channels: int, activation: str = "relu") -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8 * channels, kernel_size=2, bias=False)
        self.conv.weight.requires_grad_(False)
        self.add_module(activation, ACTIVATIONS[activation]())

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Set the filters from normalised images (N, C, H, W); 1,000 are plenty."""
        squares, count = torch.zeros((), dtype=torch.float64), 0
        for part in images.split(100):  # small enough for memory to be used again
            # as of nn.functional.unfold(part, 2), in a fifth of its time: (N, 4C, number of patches of one)
            height, width = part.shape[2] - 1, part.shape[3] - 1
            pixels = [part[:, :, y : y + height, x : x + width] for y in (0, 1) for x in (0, 1)]
            patches = torch.stack(pixels, 2).double().flatten(1, 2).flatten(2)
            squares = squares + torch.bmm(patches, patches.transpose(1, 2)).sum(0)  # (4C, 4C)
            count += len(patches) * patches.shape[2]
        size = len(squares)
        eigenvalues, eigenvectors = torch.linalg.eigh(squares / count)
        # the smallest eigenvalues are noise; the constant keeps them from being blown up
        filters = eigenvectors.T / (eigenvalues[:, None] + 5e-4).sqrt()  # (4C, 4C), one filter a row
        filters = filters.reshape(size, -1, 2, 2)
        self.conv.weight.copy_(torch.cat([filters, -filters]))


class AlignedLinear(nn.Linear):
    """`nn.Linear` whose answer for a row does not depend, in the last bits, on the row's place in the batch.

    Rows are laid out so that each begins at a multiple of 64 bytes. Where they do not (measured: MKL,
    float32, in_features no multiple of 4, 10 classes or fewer), the matrix product adds the numbers of
    different rows in different order.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, in_features) to (N, out_features)."""
        gap = -self.in_features % (64 // features.element_size())
        if gap:  # a view of wider rows
            features = nn.functional.pad(features, (0, gap))[:, : self.in_features]
        return super().forward(features)


class ConvNet(nn.Module):
    """Images (N, 3, H, W) to logits (N, num_classes), float32."""

    def __init__(
        self, config: ConvNetConfig, num_classes: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.whiten = Whitening(len(mean), config.activation) if config.whitening else None
        self.stages = nn.Sequential()
        channels = 8 * len(mean) if config.whitening else len(mean)
        for width in config.widths:
            stage = nn.Sequential()
            for block in range(config.blocks_per_stage):
                is_pooled = block == (0 if config.pool_after == "first" else config.blocks_per_stage - 1)
                inner_pool = config.pool if is_pooled and config.pool_before_norm else None
                layers = ConvBNReLU(
                    channels, width, config.batch_norm, activation=config.activation, pool=inner_pool
                )
                stage.add_module(str(block), layers)
                if is_pooled and inner_pool is None:
                    stage.add_module("pool", POOLS[config.pool](2))
                channels = width
            self.stages.append(stage)
        self.head_pool = HEAD_POOLS[config.head_pool](1)
        self.head = AlignedLinear(channels, num_classes)
        self.logit_scale = config.logit_scale

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), uint8 in 0..255 or floating point in 0..1, to logits (N, num_classes)."""
        images = self.normalize(images)
        if self.whiten is not None:
            images = self.whiten(images)
        features = self.head_pool(self.stages(images)).flatten(1)  # (N, widths[-1])
        # 8 bits of logits would make ties between classes; the head is cheap in full precision
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.head(features.to(self.head.weight.dtype))
            return logits * self.logit_scale


def build_model(
    config: ConvNetConfig,
    num_classes: int,
    *,
    image_size: int,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.25, 0.25, 0.25),
    seed: int = 0,
) -> ConvNet:
    """The network with weights drawn from `seed`, leaving PyTorch's global generator as it was.

    `image_size` is the height and width in pixels.

    Raises:
        ConfigError: when the images are too small for the number of stages, each of which halves them.
    """
    side = image_size - 1 if config.whitening else image_size  # of the maps that the first stage sees
    if side >> len(config.widths) < 1:
        raise ConfigError(
            "model",
            [
                f"model.widths: {len(config.widths)} stages halve the image as many times, but"
                f" {side}x{side} pixels allow {side.bit_length() - 1}"
            ],
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ConvNet(config, num_classes, mean, std)
        if config.init == "dirac":
            _pass_channels_through(model)
    return model


def _pass_channels_through(model: ConvNet) -> None:
    """Let each convolution start by copying its input channels (Dirac initialisation).

    The filters beyond the number of input channels keep their random weights. The first convolution,
    which sees colours, stays random. It lets the network learn from the first steps as if it were
    shallow (as in airbench, Jordan 2024, arXiv 2404.00498).
    """
    convolutions = [module for module in model.stages.modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions if model.whiten is not None else convolutions[1:]:
        nn.init.dirac_(convolution.weight.data[: convolution.in_channels])


@dataclass(frozen=True)
class LayerCost:
    """What one layer does to one image."""

    name: str
    kind: str
    output_shape: tuple[int, ...]  # without the batch dimension
    num_parameters: int
    flops: int  # of a forward pass; a multiplication and an addition count as two


def measure_layers(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[tuple[LayerCost, ...], int]:
    """Shape, parameters and FLOPs of every layer, and all FLOPs, from one pass over one blank image.

    Layers are modules without modules inside; what a network computes outside of them counts in the total
    alone.

    FLOPs are what PyTorch's own counter counts: matrix products and convolutions; other layers count
    as 0. The model is left as it was: the pass runs on a copy.
    """
    from torch.utils.flop_counter import (
        FlopCounterMode,
    )  # imports the compiler: a second that training spares

    counter = FlopCounterMode(display=False)
    shapes = _output_shapes(model, image_shape, counter)
    counts = counter.get_flop_counts()
    layers = tuple(
        LayerCost(
            name=name,
            kind=type(module).__name__,
            output_shape=shapes[name],
            num_parameters=sum(parameter.numel() for parameter in module.parameters()),
            flops=sum(counts.get(f"{type(model).__name__}.{name}", {}).values()),
        )
        for name, module in model.named_modules()
        if name in shapes
    )
    return layers, counter.get_total_flops()


def smallest_map(model: nn.Module, image_shape: tuple[int, int, int]) -> int | None:
    """The fewest values per channel that a BatchNorm layer sees of one image: the smallest H * W.

    With a batch of B images it normalises over B * H * W values, and needs more than one. None where there is
    no such layer.
    """
    shapes = _output_shapes(model, image_shape, nullcontext())
    return min(
        (
            math.prod(shapes[name][1:])
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and name in shapes
        ),
        default=None,
    )


def _output_shapes(
    model: nn.Module, image_shape: tuple[int, int, int], watching: AbstractContextManager[Any]
) -> dict[str, tuple[int, ...]]:
    """Of every layer without layers inside, without the batch dimension; a copy computes one blank image."""
    shapes: dict[str, tuple[int, ...]] = {}
    twin = copy.deepcopy(model).cpu().eval()
    for name, module in twin.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: (
                    shapes.update({name: tuple(output.shape[1:])}) if isinstance(output, Tensor) else None
                )
            )
    with torch.no_grad(), watching:
        twin(torch.zeros(1, *image_shape))
    return shapes
