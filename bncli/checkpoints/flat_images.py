"""Which layers of a network take images that were laid flat, seen by running it without computing anything.

Behind such a reshaping PyTorch has (channel, height, width) in a row and Keras (height, width, channel). The
network is run on PyTorch's `meta` device, whose tensors have shapes and no numbers.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

W = TypeVar("W", bound=TorchFunctionMode)
SIZES = (224, 32, 28, 64, 96, 128, 299)  # of the images that are tried, squares


def run_on_meta(network: nn.Module, watch_of: Callable[[nn.Module], W]) -> W | None:
    """What watched a run on an image; of a network without convolutions, no run at all.

    None where the network cannot be run on an image of any usual size. `network` is left alone.
    """
    try:
        twin = copy.deepcopy(network).to("meta").eval()
    except Exception:  # whatever the code of a network may raise
        return None
    first = next((part for part in twin.modules() if isinstance(part, _ConvNd)), None)
    if first is None:
        return watch_of(twin)
    for size in SIZES:
        shape = (2, first.in_channels, *[size] * (first.weight.dim() - 2))
        watch = watch_of(twin)
        try:
            with torch.no_grad(), watch:
                twin(torch.empty(shape, device="meta"))
        except Exception:
            continue
        return watch
    return None


def flat_pixels(network: nn.Module) -> dict[str, int] | None:
    """By linear or BatchNorm layer behind images that were laid flat: how many pixels they had, if over one.

    None where the network cannot be run on an image of any usual size. `network` is left alone.
    """
    watch = run_on_meta(network, _Watch)
    return None if watch is None else {name: pixels for name, pixels in watch.found.items() if pixels > 1}


class _Watch(TorchFunctionMode):
    """Notes the pixels of the image that was last laid flat, and the first layer behind it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, int] = {}
        self._features, self._pixels = 0, 1
        for name, part in network.named_modules():
            if isinstance(part, nn.Linear | _BatchNorm):
                part.register_forward_pre_hook(partial(self._note, name))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = args[0] if args else None
        if isinstance(out, Tensor) and isinstance(given, Tensor) and out.dim() == 2 < given.dim():
            is_flat = out.shape[1] == math.prod(given.shape[1:])
            self._features, self._pixels = out.shape[1], math.prod(given.shape[2:]) if is_flat else 1
        return out

    def _note(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0] if inputs else None
        is_flat = isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == self._features
        self.found[name] = self._pixels if is_flat else 1
        if isinstance(module, nn.Linear):
            self._features, self._pixels = 0, 1  # what comes out has no pixels
