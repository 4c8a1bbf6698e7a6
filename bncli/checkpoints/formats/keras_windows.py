"""Strides and padding of convolutions, as a configuration of Keras describes a network."""

from collections.abc import Iterator, Mapping
from typing import Any

from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.formats.window import Window, same_padding

MAX_DEPTH = 40
MAX_NODES = 10_000  # of one layer's description of its inputs
_CONVOLUTIONS = {"Conv1D", "Conv2D", "Conv3D", "DepthwiseConv1D", "DepthwiseConv2D"}
_PADDING = {"ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D"}
Entry = Mapping[str, Any]


def keras_windows(model: object, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Window]]:
    """By the name of a convolution, with those of the networks around it, dotted; what is odd is left out.

    Raises:
        UnreadableFileError: where networks are nested too deeply.
    """
    if len(names) > MAX_DEPTH:
        raise UnreadableFileError("a configuration of networks that are nested too deeply")
    listed = _config(model).get("layers")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    by_name = {str(_config(entry).get("name")): entry for entry in entries}
    before: Entry | None = None
    for entry in entries:
        config, kind = _config(entry), entry.get("class_name")
        own = (*names, str(config.get("name")))
        if kind in _CONVOLUTIONS:
            source = by_name.get(_input(entry) or "", before)
            window = _window(config, source if source and source.get("class_name") in _PADDING else None)
            if window is not None:
                yield ".".join(own), window
        yield from keras_windows(entry, own)
        before = entry


def _config(entry: object) -> Entry:
    config = entry.get("config") if isinstance(entry, dict) else None
    return config if isinstance(config, dict) else {}


def _input(entry: Entry) -> str | None:
    """The layer whose output a layer takes first; None in a Sequential network, where it is the one before.

    Keras 3 writes `keras_history: [NAME, ...]` into the arguments, Keras 2 `[[[NAME, 0, 0, {}]]]`.
    """
    nodes: list[object] = [entry.get("inbound_nodes")]
    for _ in range(MAX_NODES):
        if not nodes:
            break
        node = nodes.pop()
        if isinstance(node, dict):
            history = node.get("keras_history")
            nodes += [history] if history else reversed(list(node.values()))
        elif isinstance(node, list) and node:
            if isinstance(node[0], str):
                return node[0]
            nodes += reversed(node)
    return None


def _window(config: Entry, padding: Entry | None) -> Window | None:
    if config.get("data_format", "channels_last") != "channels_last":
        return None
    kernel = _numbers(config.get("kernel_size"))
    stride = _numbers(config.get("strides"), len(kernel))
    dilation = _numbers(config.get("dilation_rate", 1), len(kernel))
    if not kernel or not len(kernel) == len(stride) == len(dilation):
        return None
    if config.get("padding") == "same":
        own = same_padding(kernel, stride, dilation)
    elif config.get("padding") == "valid":
        own = ((0, 0),) * len(kernel)
    else:
        return None
    before = ((0, 0),) * len(kernel) if padding is None else _pairs(_config(padding).get("padding"), len(own))
    if before is None:
        return None
    return Window(stride, tuple((a + c, b + d) for (a, b), (c, d) in zip(own, before, strict=True)))


def _numbers(value: object, axes: int = 1) -> tuple[int, ...]:
    values: list[Any] = value if isinstance(value, list) else [value] * axes
    return tuple(values) if all(type(one) is int and 0 < one < 2**31 for one in values) else ()


def _pairs(value: object, axes: int) -> tuple[tuple[int, int], ...] | None:
    """Zeros before and behind, as ZeroPadding writes them."""
    pairs = value if isinstance(value, list) else [value] * axes
    pairs = [pairs] if axes == 1 and all(type(one) is int for one in pairs) else pairs
    found = [tuple(pair) if isinstance(pair, list) else (pair, pair) for pair in pairs]
    are_sizes = all(len(pair) == 2 and all(type(one) is int for one in pair) for pair in found)
    return tuple(found) if are_sizes and len(found) == axes else None
