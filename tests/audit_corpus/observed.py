"""What a network really does in eval mode, layer by layer: the oracle for what is true and what is not.

A finding about a channel (dead, ruled by eps, far steeper than others, switched off, far from 0) is a fact
where the network's own activations show it. Written beside the checkpoint: judging has only the file.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Images are a sample, and rules have limits: a fact may lie this far on the other side of a rule's limit.
SLACK = 2.0


@dataclass(frozen=True)
class Observed:
    """Of a network in eval mode on its training images."""

    facts: dict[str, list[str]]  # code of a rule: layers of which its claim is true
    # distance of running from true statistics, in deviations, RMS over a layer's channels: 0 is a fixed point
    median_distance: float
    largest_distance: float


@dataclass
class _Layer:
    """Sums over what one layer saw."""

    count: int = 0
    total: Tensor | float = 0.0  # (C,)
    squares: Tensor | float = 0.0  # (C,)
    positive: Tensor | float = 0.0  # (C,), outputs above 0

    def see(self, values: Tensor, output: Tensor) -> None:
        rows = values.detach().double().transpose(0, 1).flatten(1)  # (C, values)
        self.count += rows.shape[1]
        self.total = self.total + rows.sum(1)
        self.squares = self.squares + rows.square().sum(1)
        self.positive = self.positive + (output.detach() > 0).double().transpose(0, 1).flatten(1).sum(1)


@torch.no_grad()
def observe(model: nn.Module, batches: Sequence[Any]) -> Observed:
    """Run batches in eval mode; the model is left in eval mode, its buffers as they were."""
    model.eval()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_var is not None
    }
    seen = {name: _Layer() for name in layers}
    handles = [
        module.register_forward_hook(
            lambda _, args, output, name=name: seen[name].see(args[0], output)  # type: ignore[misc]
        )
        for name, module in layers.items()
    ]
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    facts: dict[str, list[str]] = {}
    distances = []
    for name, layer in layers.items():
        if seen[name].count:
            true, distance = _judge(layer, seen[name])
            distances.append(distance)
            for code in true:
                facts.setdefault(code, []).append(name)
    ordered = sorted(distances) or [0.0]
    return Observed(facts, ordered[len(ordered) // 2], ordered[-1])


def _judge(layer: _BatchNorm, seen: _Layer) -> tuple[list[str], float]:
    """The codes whose claim is true of some channel, and how far its statistics are from the true ones."""
    mean = torch.as_tensor(seen.total) / seen.count
    var = (torch.as_tensor(seen.squares) / seen.count - mean.square()).clamp(min=0)
    weight = torch.ones_like(mean) if layer.weight is None else layer.weight.detach().double()
    eps = layer.eps
    gain = weight.abs() / (var + eps).sqrt()
    claims = {
        "BN005": var < SLACK * eps,
        "BN006": (weight == 0) | (var < SLACK * 0.01 * eps),
        "BN007": gain > 1 / SLACK * torch.maximum(30 * gain.median(), torch.tensor(100.0)),
        "BN008": torch.as_tensor(seen.positive) / seen.count < 1e-3,
        "BN012": mean.abs() > 64 / SLACK * (var + 1e-12).sqrt(),
    }
    running_mean, running_var = (getattr(layer, name).double() for name in ("running_mean", "running_var"))
    shift = (running_mean - mean) / (var + eps).sqrt()
    ratio = ((running_var + eps) / (var + eps)).clamp(min=1e-12).log()
    distance = float((shift.square() + ratio.square()).mean().sqrt())
    return [code for code, found in claims.items() if bool(found.any())], distance


def write_observed(observed: Observed, checkpoint: Path) -> None:
    """Beside the checkpoint."""
    checkpoint.with_suffix(".observed.json").write_text(json.dumps(asdict(observed)))


def read_observed(checkpoint: Path) -> Observed | None:
    """What was observed of a checkpoint's network; None where only the file was made."""
    path = checkpoint.with_suffix(".observed.json")
    return Observed(**json.loads(path.read_text())) if path.exists() else None
