"""`runtime.weight_gradient`: which convolutions compute it as a product of patches.

With `auto` none do, except on processors with AMX: there PyTorch's gradient by the weight lags behind what
the processor multiplies, and each layer takes what is faster in a short measurement before the first step.
What was measured is recorded in the checkpoint, and holds when the run is resumed: another choice would round
otherwise.
"""

import time
from collections.abc import Callable

import torch
from torch import nn

from bncli.hardware import has_amx
from bncli.training.convolution_calls import ConvolutionCall, convolution_calls
from bncli.training.patch_convolution import fits_patches, weight_gradient
from bncli.training.setup import Setup

_ROUNDS = 5  # the best of them counts; the first is to warm up
_LEAST_GAIN = 1.05  # below it may be chance


def layers_by_patches(setup: Setup, recorded: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of those layers; `recorded` are those of the run that is resumed, None of a new one."""
    wanted = setup.config.runtime.weight_gradient
    if wanted == "torch":
        return ()
    if wanted == "patches":
        return tuple(
            name
            for name, layer in setup.model.named_modules()
            if fits_patches(layer) and isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad
        )
    if recorded is not None:
        return recorded
    runtime = setup.runtime
    is_slow = runtime.device.type == "cpu" and runtime.precision == torch.bfloat16 and has_amx()
    if runtime.compiles or not is_slow:
        return ()
    # of several processes all measure, for they share the machine, and take what the first one found
    found = measured_layers(setup)
    return found if setup.processes is None else setup.processes.from_main(found)


def measured_layers(setup: Setup) -> tuple[str, ...]:
    """The layers in which patches are faster here, on parts of batches of full-sized images."""
    num_images = setup.share_of(setup.plan.batch_size).sizes[0]
    images = torch.zeros(num_images, *setup.image_shape, dtype=torch.uint8)
    layers = dict(setup.model.named_modules())
    gains: dict[str, list[tuple[float, float]]] = {}
    for call in convolution_calls(setup.model, images, setup.runtime):
        if call.needs_weight_gradient and fits_patches(layers[call.name]):
            gains.setdefault(call.name, []).append(_time_both(call, setup.runtime.memory_format))
    return tuple(
        name
        for name, times in gains.items()
        if sum(torchs for torchs, _ in times) > _LEAST_GAIN * sum(patches for _, patches in times)
    )


def _time_both(call: ConvolutionCall, memory_format: torch.memory_format) -> tuple[float, float]:
    """Seconds of PyTorch's gradient by the weight, and of that by patches, in turns."""
    images, weight, gradient = call.draw(torch.device("cpu"), memory_format)
    sizes = (call.weight_shape[2:], call.stride, call.padding, call.dilation)
    ways: tuple[Callable[[], object], ...] = (
        lambda: call.backward(gradient, images, weight),
        lambda: weight_gradient(gradient, images, *sizes),
    )
    best = [float("inf")] * 2
    for number in range(_ROUNDS + 1):
        for index, way in enumerate(ways):
            start = time.perf_counter()
            way()
            if number:
                best[index] = min(best[index], time.perf_counter() - start)
    return best[0], best[1]
