"""How fast the convolutions of a network are computed here, beside matrix products of the same sizes.

A convolution is three products in a training step: forward, its gradient by the input, and its gradient by
the weight. Each is as many multiplications as the product of two matrices, patches of the images and weights;
so a matrix product of these sizes, and the best one of all, say what the machine could do.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bncli.runtime import synchronize
from bncli.training import Setup
from bncli.training.convolution_calls import ConvolutionCall, convolution_calls
from bncli.training.patch_convolution import fits_patches, weight_gradient

_ROUNDS = 7  # all ways in turns, after one to warm up; the best counts
_MATRIX_BYTES = 64 * 2**20  # of the patches in a matrix product: of more images it is as fast

FORWARD, BY_INPUT, BY_WEIGHT, BY_PATCHES = "forward", "by input", "by weight", "by weight, patches"


@dataclass(frozen=True)
class ProductSpeed:
    """One of the products of a convolution."""

    product: str  # forward, by input, by weight (PyTorch's), or by weight, patches (bncli's)
    gflops_per_second: float
    share_of_peak: float  # of the best matrix product
    matrix_gflops_per_second: float  # of a matrix product of the same sizes
    share_of_step: float | None  # of the time of a training step; None where the step does not compute it


@dataclass(frozen=True)
class ConvolutionSpeed:
    """A convolution in a training step."""

    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    groups: int
    output_size: tuple[int, int]
    num_images: int  # computed at once
    products: tuple[ProductSpeed, ...]


def bench_convolutions(
    setup: Setup, by_patches: tuple[str, ...], *, peak: float, seconds_per_image: float
) -> tuple[ConvolutionSpeed, ...]:
    """Every convolution of a network that trains; `by_patches` are the layers whose step computes patches.

    `peak` is that of `matrix_gflops`, `seconds_per_image` the time of the step.
    """
    num_images = setup.share_of(setup.plan.batch_size).sizes[0]
    images = torch.zeros(num_images, *setup.image_shape, dtype=torch.uint8)
    layers = dict(setup.model.named_modules())
    found = []
    for call in convolution_calls(setup.model, images, setup.runtime):
        can_patch = call.name in by_patches or fits_patches(layers[call.name])
        step_seconds = seconds_per_image * num_images
        products = _products(call, setup, can_patch=can_patch, is_patched=call.name in by_patches)
        speeds = tuple(
            ProductSpeed(
                product=name,
                gflops_per_second=call.flops / seconds / 1e9,
                share_of_peak=call.flops / seconds / 1e9 / peak,
                matrix_gflops_per_second=matrix,
                share_of_step=seconds / step_seconds if is_used else None,
            )
            for name, is_used, seconds, matrix in products
        )
        found.append(
            ConvolutionSpeed(
                name=call.name,
                in_channels=call.input_shape[1],
                out_channels=call.weight_shape[0],
                kernel_size=call.weight_shape[2:],
                groups=call.groups,
                output_size=call.output_size,
                num_images=num_images,
                products=speeds,
            )
        )
    return tuple(found)


def _products(
    call: ConvolutionCall, setup: Setup, *, can_patch: bool, is_patched: bool
) -> Iterator[tuple[str, bool, float, float]]:
    """Each product, whether the step computes it, its seconds, and the rate of the matrix product."""
    device = setup.runtime.device
    images, weight, gradient = call.draw(device, setup.runtime.memory_format)
    window = (call.stride, call.padding, call.dilation)
    ways: dict[str, tuple[bool, Callable[[], object]]] = {
        FORWARD: (True, lambda: torch.nn.functional.conv2d(images, weight, None, *window, call.groups)),
        BY_INPUT: (
            call.needs_input_gradient,
            lambda: call.backward(gradient, images, weight, by_input=True),
        ),
        BY_WEIGHT: (
            call.needs_weight_gradient and not is_patched,
            lambda: call.backward(gradient, images, weight),
        ),
    }
    if can_patch:
        sizes = (call.weight_shape[2:], *window)
        ways[BY_PATCHES] = (is_patched, lambda: weight_gradient(gradient, images, *sizes))
    # (rows, values) patches, (values, out) weight and (rows, out) gradient, of one group
    values = call.weight_shape[1] * call.weight_shape[2] * call.weight_shape[3]
    rows = max(1, min(call.num_pixels, _MATRIX_BYTES // (values * images.element_size())))
    width = call.weight_shape[0] // call.groups
    patches = torch.randn(rows, values).to(device, call.dtype)
    matrix, outputs = (torch.randn(size, width).to(device, call.dtype) for size in (values, rows))
    matrices: list[Callable[[], object]] = [
        lambda: patches @ matrix,
        lambda: outputs @ matrix.T,
        lambda: outputs.T @ patches,
    ]
    times = _best_times([*(way for _, way in ways.values()), *matrices], device)
    flops = 2 * rows * values * width
    rates = [flops / seconds / 1e9 for seconds in times[len(ways) :]]
    for (name, (is_used, _)), seconds, rate in zip(ways.items(), times, [*rates, rates[-1]], strict=False):
        yield name, is_used, seconds, rate


def _best_times(ways: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Seconds of each at best, all in turns."""
    best = [float("inf")] * len(ways)
    for number in range(_ROUNDS + 1):
        for index, way in enumerate(ways):
            start = time.perf_counter()
            way()
            synchronize(device)
            if number:
                best[index] = min(best[index], time.perf_counter() - start)
    return best
