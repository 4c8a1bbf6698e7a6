"""The output of `bncli inspect-stats`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bncli.cli.messages import one_line
from bncli.cli.render import console_for_results, number, table_of
from bncli.stats import LayerStats, dead_channels, layer_flags, summarize


def describe_layers(checkpoint: str, layers: Sequence[LayerStats], *, channels: bool) -> dict[str, Any]:
    """The JSON document of `bncli inspect-stats`."""
    return {
        "checkpoint": checkpoint,
        "num_layers": len(layers),
        "layers": [_describe_layer(layer, channels=channels) for layer in layers],
    }


def _describe_layer(layer: LayerStats, *, channels: bool) -> dict[str, Any]:
    tensors = {
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "weight": layer.weight,
        "bias": layer.bias,
    }
    described: dict[str, Any] = {
        "name": layer.name,
        "num_features": layer.num_features,
        "num_batches_tracked": layer.num_batches_tracked,
        "momentum": layer.momentum,
        "eps": layer.eps,
        "hyperparameters_known": layer.hyperparameters_known,
        **{name: summarize(tensor) for name, tensor in tensors.items()},
        "flags": layer_flags(layer),
        "dead_channels": torch.nonzero(dead_channels(layer)).flatten(),
    }
    if channels:
        described["channels"] = tensors
    return described


def show_layers(headline: str, layers: Sequence[LayerStats]) -> None:
    """One row per BatchNorm layer; a number that is the same in all of them stands above the table."""
    console = console_for_results()
    console.print(one_line(headline), style="bold")
    common = {
        "num_batches_tracked": [_count(layer.num_batches_tracked) for layer in layers],
        "momentum": [_momentum(layer) for layer in layers],
        "eps": [_eps(layer) for layer in layers],
    }
    uniform = [f"{name} {values[0]}" for name, values in common.items() if len(set(values)) == 1]
    if uniform:
        console.print(f"In every layer: {', '.join(uniform)}")
    differing = {name: values for name, values in common.items() if len(set(values)) > 1}
    table = table_of(
        None,
        "layer",
        "channels",
        *differing,
        "running_mean\nmin, median, max",
        "running_var\nmin, median, max",
        "weight\nmin, max",
    )
    means = _three_columns([layer.running_mean for layer in layers])
    variances = _three_columns([layer.running_var for layer in layers])
    for index, layer in enumerate(layers):
        weight = summarize(layer.weight)
        table.add_row(
            one_line(layer.name),
            str(layer.num_features),
            *(values[index] for values in differing.values()),
            means[index],
            variances[index],
            "-" if weight is None else f"{number(weight.min)} {number(weight.max)}",
            style="bold red" if layer_flags(layer) else None,
        )
    console.print(table)
    console.print()
    flagged = [(layer, layer_flags(layer)) for layer in layers if layer_flags(layer)]
    for layer, flags in flagged:
        console.print(f"{one_line(layer.name)}: {', '.join(flags)}{_dead(layer)}", style="bold red")
    if not flagged:
        console.print("Flags: none. Every layer was updated, is finite and has no dead channel.")


def _count(number: int | None) -> str:
    return "unknown" if number is None else str(number)


def _dead(layer: LayerStats) -> str:
    dead = torch.nonzero(dead_channels(layer)).flatten().tolist()
    if not dead:
        return ""
    shown = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
    return f" ({len(dead)} of {layer.num_features} channels dead: {shown})"


def _momentum(layer: LayerStats) -> str:
    if not layer.hyperparameters_known:
        return "unknown"
    return "cumulative" if layer.momentum is None else f"{layer.momentum:g}"


def _eps(layer: LayerStats) -> str:
    return "unknown" if layer.eps is None else f"{layer.eps:g}"


def _three_columns(tensors: Sequence[Tensor | None]) -> list[str]:
    """Minimum, median and maximum of each, aligned among themselves: narrower than three columns."""
    summaries = [summarize(tensor) for tensor in tensors]
    rows = [[number(s.min), number(s.median), number(s.max)] if s else ["-"] * 3 for s in summaries]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [" ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]


def show_channels(layers: Sequence[LayerStats]) -> None:
    """One table per layer with one row per channel."""
    console = console_for_results()
    for layer in layers:
        table = table_of(
            f"{one_line(layer.name)}: momentum {_momentum(layer)}, eps {_eps(layer)}",
            "channel",
            "running_mean",
            "running_var",
            "weight",
            "bias",
            "flag",
            left=0,
        )
        dead = dead_channels(layer).tolist()
        tensors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        columns = [[None] * layer.num_features if t is None else t.tolist() for t in tensors]
        for channel, values in enumerate(zip(*columns, strict=True)):
            flag = "dead" if dead[channel] else ""
            numbers = ("-" if value is None else f"{value:.4g}" for value in values)
            table.add_row(str(channel), *numbers, flag)
        console.print(table)
