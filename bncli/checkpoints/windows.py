"""Strides and padding of a network's convolutions, seen by running it, beside those of another framework."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from bncli.checkpoints.flat_images import run_on_meta
from bncli.checkpoints.formats.window import Window, same_padding
from bncli.wording import list_names

_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)


def windows_of(network: nn.Module) -> dict[str, Window]:
    """By convolution that is not transposed; padding by zeros of its own counts (`ZeroPad2d`, `Conv2dSame`).

    Empty where the network cannot be run on an image of any usual size.
    """
    watch = run_on_meta(network, _Watch)
    return {} if watch is None else watch.found


class _Watch(TorchFunctionMode):
    """Notes how convolutions are called, and what was padded before."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, Window] = {}
        self._names = {
            id(part.weight): name for name, part in network.named_modules() if isinstance(part, _ConvNd)
        }
        self._padded: list[tuple[Tensor, list[int]]] = []  # the tensors are kept, so that no id is used again

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is functional.pad and isinstance(out, Tensor):
            given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
            if given.get("mode", "constant") == "constant" and not given.get("value"):
                self._padded.append((out, list(given["pad"])))
        if func in _CONVOLUTIONS:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            self._note(dict(zip(names, args, strict=False)) | kwargs)
        return out

    def _note(self, call: Mapping[str, Any]) -> None:
        name, weight = self._names.get(id(call["weight"])), call["weight"]
        if name is None:
            return
        kernel = tuple(weight.shape[2:])
        stride = _of_each_axis(call.get("stride", 1), len(kernel))
        padding = call.get("padding", 0)
        if padding == "same":
            own = same_padding(kernel, stride, _of_each_axis(call.get("dilation", 1), len(kernel)))
        else:
            own = tuple(
                (size, size) for size in _of_each_axis(0 if padding == "valid" else padding, len(kernel))
            )
        before = next((pad for tensor, pad in self._padded if tensor is call["input"]), [])
        pads = [*zip(before[::2], before[1::2], strict=True)][: len(kernel)]  # the last axis comes first
        pads += [(0, 0)] * (len(kernel) - len(pads))
        both = zip(own, reversed(pads), strict=True)
        self.found[name] = Window(stride, tuple((a + c, b + d) for (a, b), (c, d) in both))


def _of_each_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(map(int, value))
    return values * axes if len(values) == 1 else values


def describe_windows(found: Mapping[str, Window], wanted: Mapping[str, Window], framework: str) -> list[str]:
    """What has to be set so that a network computes what the file's does; both by the network's names."""
    notes = []
    strides = {
        name: window.stride
        for name, window in wanted.items()
        if name in found and found[name].stride != window.stride
    }
    if strides:
        listed = list_names([f"{name}.stride {stride}" for name, stride in strides.items()], 8)
        notes.append(f"{framework} has other strides: outputs differ until these are set: {listed}.")
    by_padding: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name, window in wanted.items():
        if name in found and found[name].padding != window.padding:
            by_padding.setdefault(window.padding, []).append(name)
    for padding, names in by_padding.items():
        layers = list_names(names, 8)
        if all(before == behind for before, behind in padding):
            to_set = f"padding is {tuple(before for before, _ in padding)}"
        else:
            pads = tuple(size for pair in reversed(padding) for size in pair)
            to_set = f"padding is 0 behind nn.ZeroPad{len(padding)}d({pads})"
        notes.append(f"{framework} pads in another way: outputs differ until {to_set} in {layers}.")
    return notes
