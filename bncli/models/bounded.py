"""A bound for what making a network may take, where a file from anybody says what to make.

`num_classes: 1000000000` is a few bytes in a file, and would fill the memory. Every tensor that is created is
counted before it is; the network that a file's tensors belong to needs no more than those.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bncli.errors import BncliError

_SLACK_BYTES = 64 * 2**20  # for what an initialisation holds for a moment, and buffers that are not saved
_SLACK_TENSORS = 1_000
_BY_NUMBERS = ("arange", "linspace", "logspace")  # their lengths follow from numbers


class Bounded(TorchDispatchMode):
    """A context in which tensors can be created that take about as much as those of `state_dict`.

    Raises:
        BncliError: from the operation that would create more.
    """

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # twice, for networks that copy their weights once
        self._bytes_left = _SLACK_BYTES + 2 * sum(tensor.nbytes for tensor in state_dict.values())
        self._tensors_left = _SLACK_TENSORS + 20 * len(state_dict)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count what one operation creates."""
        kwargs = kwargs or {}
        size = _created_elements(func, args)
        if size is not None:
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            self._bytes_left -= size * dtype.itemsize
            self._tensors_left -= 1
            if self._bytes_left < 0 or self._tensors_left < 0:
                raise BncliError("the network would be far larger than they are")
        return func(*args, **kwargs)


def _created_elements(func: Callable[..., Any], args: tuple[Any, ...]) -> int | None:
    """Of the tensor that an operation creates from nothing; None where it computes with others."""
    if any(isinstance(arg, Tensor) for arg in args):
        return None
    first = args[0] if args else None
    if isinstance(first, (list, tuple)) and all(isinstance(length, int) for length in first):
        return math.prod(first)  # empty, zeros, ones, full, rand, ...
    numbers = [arg for arg in args if isinstance(arg, (int, float))]
    if getattr(func, "__name__", "").split(".")[0] not in _BY_NUMBERS or not numbers:
        return None
    return int(max(map(abs, numbers)))
