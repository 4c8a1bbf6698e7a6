"""The numbers of all layers, and of as many channels as a page may hold, in the form that the page reads.

Layers are columns of rounded numbers. Channels are float32, little-endian, in base64: NaN and infinity stay
what they are, and a channel takes 21 bytes. Of a network with more channels than `MAX_CHANNELS` those layers
come first that the page is about, then those in which something was found, then those that stand out.
"""

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bncli.batchnorm import Finding, LayerStats, summarize
from bncli.batchnorm.audit.channels import Channels, channels_of, gain, mean_in_deviations
from bncli.wording import one_line

MAX_CHANNELS = 60_000  # 1.3 MB; ResNet-152 has 75,712 with all its layers, ResNet-50 26,560
SEVERITIES = ("error", "warning", "info")  # the gravest first


def rounded(value: float | None, digits: int = 4) -> float | str | None:
    """A number of so many significant digits; "NaN" and "Infinity" as words, which JSON does not have."""
    if value is None:
        return None
    if math.isfinite(value):
        return float(f"{value:.{digits}g}")
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def describe_layers(layers: Sequence[LayerStats], findings: Sequence[Finding]) -> dict[str, list[Any]]:
    """One list per quantity, with an entry for each layer."""
    counts = {severity: Counter[str]() for severity in SEVERITIES}
    for finding in findings:
        counts[finding.severity][finding.layer] += 1
    columns: dict[str, list[Any]] = {
        "name": [one_line(layer.name) or "(the module itself)" for layer in layers],
        "channels": [layer.num_features for layer in layers],
        "tracked": [layer.num_batches_tracked for layer in layers],
        "momentum": [_momentum(layer) for layer in layers],
        "eps": [layer.eps for layer in layers],
        **{severity: [found[layer.name] for layer in layers] for severity, found in counts.items()},
    }
    for name in ("running_mean", "running_var", "weight"):
        found = [summarize(getattr(layer, name)) for layer in layers]
        for part in ("min", "median", "max"):
            columns[f"{name}_{part}"] = [one and rounded(getattr(one, part)) for one in found]
    channels = channels_of(layers)
    for name, values in (("gain", gain(channels)), ("mean_in_deviations", mean_in_deviations(channels))):
        columns[f"{name}_max"] = [rounded(value) for value in _largest(values, channels, len(layers))]
    return columns


def _largest(values: Tensor, channels: Channels, num_layers: int) -> list[float | None]:
    """Of each layer, without what is no number; None where nothing is left."""
    largest = torch.full((num_layers,), -torch.inf, dtype=torch.float64)
    largest = largest.scatter_reduce(
        0, channels.layer, values.nan_to_num(-torch.inf, posinf=torch.inf), "amax"
    )
    return [None if value == -math.inf else value for value in largest.tolist()]


def _momentum(layer: LayerStats) -> float | str | None:
    if not layer.hyperparameters_known:
        return None
    return "cumulative" if layer.momentum is None else layer.momentum


def describe_channels(
    layers: Sequence[LayerStats],
    findings: Sequence[Finding],
    *,
    first: Sequence[str] = (),
    max_channels: int = MAX_CHANNELS,
) -> dict[str, Any]:
    """The chosen layers' indices, and their channels end to end; `eps` is the one that is computed with.

    The layers named in `first` are in the page before any other.
    """
    chosen = _chosen(layers, findings, first, max_channels)
    all_of_them = channels_of([layers[index] for index in chosen])
    tensors = {
        "running_mean": all_of_them.running_mean,
        "running_var": all_of_them.running_var,
        "weight": all_of_them.weight,
        "bias": all_of_them.bias,
    }
    return {
        "layers": chosen,
        "eps": [layers[index].eps_or_default for index in chosen],
        **{name: _packed(tensor) for name, tensor in tensors.items()},
    }


def _chosen(
    layers: Sequence[LayerStats], findings: Sequence[Finding], first: Sequence[str], max_channels: int
) -> list[int]:
    """In model order; a layer that alone is too large is left out, and smaller ones after it are not."""
    everything = range(len(layers))
    if sum(layer.num_features for layer in layers) <= max_channels:
        return list(everything)
    place = {name: -index for index, name in enumerate(reversed(first), 1)}
    gravity: Mapping[str, int] = {
        finding.layer: SEVERITIES.index(finding.severity)
        for finding in sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity))
    }
    ranks = _ranks(layers)
    order = sorted(
        everything,
        key=lambda index: (
            place.get(layers[index].name, 0),
            gravity.get(layers[index].name, len(SEVERITIES)),
            ranks[index],
        ),
    )
    chosen, room = [], max_channels
    for index in order:
        if layers[index].num_features <= room:
            chosen.append(index)
            room -= layers[index].num_features
    return sorted(chosen)


def _ranks(layers: Sequence[LayerStats]) -> list[int]:
    """Each layer's best place in three orders of the page: largest gain, farthest mean, least variance."""
    channels = channels_of(layers)
    best = torch.full((len(layers),), len(layers))
    for values in (gain(channels), mean_in_deviations(channels), -channels.running_var):
        largest = _largest(values, channels, len(layers))
        numbers = torch.tensor([-math.inf if value is None else value for value in largest])
        best = torch.minimum(best, numbers.argsort(descending=True, stable=True).argsort())
    return best.tolist()


def _packed(values: Tensor) -> str:
    return base64.b64encode(values.to(torch.float32).numpy().astype("<f4").tobytes()).decode()
