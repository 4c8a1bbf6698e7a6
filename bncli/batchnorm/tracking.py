"""What the batches of one epoch looked like to each BatchNorm layer, recovered from its buffers.

No hook and no second pass: the layer has already measured every batch and folded the result into its
running statistics, r_t = (1 - m) r_{t-1} + m b_t for step t, momentum m and batch statistic b_t. Solving
for b_t and summing over t = 1..S, the inner terms telescope:

    sum_t b_t = sum_t r_t + (1 - m) / m * (r_S - r_0)

so that adding up the buffers after every step is all there is to do. With momentum None, r_k is the mean
over the k batches tracked so far and the sum is k_S r_S - k_0 r_0.

Precision: the buffers' own rounding, divided by m: about 1e-6 relative in float32 with m = 0.1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batchnorm.distance import measure_distance
from bncli.batchnorm.layers import batch_norm_layers
from bncli.wording import plural


@dataclass(frozen=True, eq=False)
class LayerEpoch:
    """One layer after one epoch: its running statistics against the batches it was trained on.

    The batch values are None where they cannot be recovered: no running statistics, momentum 0 or
    changed on the way, a layer in eval mode, or one that did not see exactly one batch per step.
    """

    name: str
    num_batches: int  # that the layer tracked during the epoch
    running_mean_norm: float | None  # L2 norm over channels, at the end
    running_var_norm: float | None  # L2 norm over channels, at the end
    batch_mean: Tensor | None  # (C,) float64, average of the batch means, each batch counting once
    batch_var: Tensor | None  # (C,) float64, average of the unbiased batch variances
    # RMS over channels of (running_mean - batch_mean) / sqrt(batch_var + eps)
    mean_shift_in_batch_deviations: float | None
    # geometric mean over channels of (running_var + eps) / (batch_var + eps): of what is divided by
    var_ratio: float | None

    def __str__(self) -> str:
        """One line."""
        if self.mean_shift_in_batch_deviations is None:
            return f"{self.name}: {plural(self.num_batches, 'batch', 'batches')}, which cannot be recovered"
        return (
            f"{self.name}: {plural(self.num_batches, 'batch', 'batches')}; running_mean is off by"
            f" {self.mean_shift_in_batch_deviations:.2g} of their deviations, running_var is"
            f" {self.var_ratio:.2g} times theirs"
        )


class EpochStatistics:
    """Follows the BatchNorm layers of a model through one epoch.

    Create it before the first step, call `observe` after every forward pass in train mode (a "step" here; a
    training step with micro-batches has several), and `finish` once at the end. It only reads, and costs one
    small addition per buffer and step.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the running statistics as they are now for the epoch's start."""
        self._layers = [_Layer(name, module) for name, module in batch_norm_layers(model)]
        self.num_steps = 0

    def observe(self) -> None:
        """Add the running statistics, as this step left them, to the sums."""
        self.num_steps += 1
        for layer in self._layers:
            layer.observe()

    def finish(self) -> tuple[LayerEpoch, ...]:
        """The epoch's statistics of every layer, in model order."""
        return tuple(layer.finish(self.num_steps) for layer in self._layers)

    def sums(self) -> list[Tensor]:
        """The tensors that `observe` adds to, for a caller who may have to undo it (with `num_steps`)."""
        return [total for layer in self._layers for total in layer.sums]

    def state_dict(self) -> dict[str, Any]:
        """Everything observed so far as tensors and plain values: a copy."""
        layers = {layer.name: layer.state_dict() for layer in self._layers}
        return {"num_steps": self.num_steps, "layers": layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state` as if the steps before it had been observed here, bit for bit.

        Raises:
            KeyError, ValueError: when it is the state of a model with other layers.
        """
        if list(state["layers"]) != [layer.name for layer in self._layers]:
            raise ValueError(f"epoch statistics of other layers: {', '.join(state['layers'])}")
        self.num_steps = int(state["num_steps"])
        for layer in self._layers:
            layer.load_state_dict(state["layers"][layer.name])


class _Layer:
    """The sums of one layer."""

    def __init__(self, name: str, module: _BatchNorm) -> None:
        self.name = name
        self.module = module
        self.momentum = module.momentum
        self.momentum_constant = True
        self.num_batches = _num_batches(module)
        self.start = _float64_copies(module)
        self.sums = [torch.zeros_like(buffer, dtype=_sum_dtype(buffer)) for buffer in _buffers(module)]

    def observe(self) -> None:
        self.momentum_constant &= self.module.momentum == self.momentum
        if self.momentum is None:
            return  # start and end say all
        for total, buffer in zip(self.sums, _buffers(self.module), strict=True):
            total.add_(buffer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "momentum": self.momentum,
            "momentum_constant": self.momentum_constant,
            "num_batches": self.num_batches,
            "start": [tensor.clone() for tensor in self.start],
            "sums": [total.clone() for total in self.sums],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.momentum = state["momentum"]
        self.momentum_constant = bool(state["momentum_constant"])
        self.num_batches = int(state["num_batches"])
        for name, tensors in (("start", self.start), ("sums", self.sums)):
            for tensor, saved in zip(tensors, state[name], strict=True):
                tensor.copy_(saved)

    def finish(self, num_steps: int) -> LayerEpoch:
        end = _float64_copies(self.module)
        num_batches = _num_batches(self.module) - self.num_batches
        averages = self._averages(end, num_batches, num_steps)
        batch_mean = batch_var = mean_shift = var_ratio = None
        if averages:
            # rounding may take the average variance of a constant channel just below 0
            batch_mean, batch_var = averages[0], averages[1].clamp(min=0)
            found = measure_distance((end[0], end[1]), (batch_mean, batch_var), eps=self.module.eps)
            mean_shift, var_ratio = found.rms_mean_shift, found.mean_var_ratio
        return LayerEpoch(
            name=self.name,
            num_batches=num_batches,
            running_mean_norm=float(end[0].norm()) if end else None,
            running_var_norm=float(end[1].norm()) if end else None,
            batch_mean=batch_mean,
            batch_var=batch_var,
            mean_shift_in_batch_deviations=mean_shift,
            var_ratio=var_ratio,
        )

    def _averages(self, end: list[Tensor], num_batches: int, num_steps: int) -> list[Tensor]:
        """Average batch mean and variance (C,) each; empty where they cannot be recovered."""
        if not end or not self.momentum_constant or num_batches <= 0:
            return []
        if self.momentum is None:
            first, last = self.num_batches, self.num_batches + num_batches
            pairs = zip(self.start, end, strict=True)
            return [(last * after - first * before) / num_batches for before, after in pairs]
        # a layer that ran twice in a step, or in eval mode, took other steps than those observed
        if self.momentum == 0 or num_batches != num_steps:
            return []
        lag = (1 - self.momentum) / self.momentum
        triples = zip(self.sums, self.start, end, strict=True)
        return [
            (total.cpu().double() + lag * (after - before)) / num_steps for total, before, after in triples
        ]


def _buffers(module: _BatchNorm) -> list[Tensor]:
    """running_mean and running_var, or nothing."""
    if module.running_mean is None or module.running_var is None:
        return []
    return [module.running_mean, module.running_var]


def _float64_copies(module: _BatchNorm) -> list[Tensor]:
    return [buffer.detach().cpu().to(torch.float64, copy=True) for buffer in _buffers(module)]


def _num_batches(module: _BatchNorm) -> int:
    return 0 if module.num_batches_tracked is None else int(module.num_batches_tracked.item())


def _sum_dtype(buffer: Tensor) -> torch.dtype:
    return torch.float32 if buffer.device.type == "mps" else torch.float64  # MPS has no float64
