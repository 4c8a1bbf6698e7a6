"""BatchNorm that normalises by the whole batch of several processes, and its gradients.

Each process computes the mean and the sum of squared deviations (m2) of its values; all of them are exchanged
and merged (Chan, Golub and LeVeque 1983). That is what `torch.nn.SyncBatchNorm` does on GPUs, in kernels of
its own; it does not train on a CPU. Here it is plain differentiable code, which takes longer than BatchNorm's
kernel and waits for all processes in every layer, twice.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.distributed.processes import Processes


@contextlib.contextmanager
def synchronized(model: nn.Module, processes: Processes) -> Iterator[None]:
    """Let the model's BatchNorm layers, in train mode, normalise by the images of all processes in the block.

    Backward passes belong into the block too. Every process has to compute the same layers, each with its own
    images. Their running statistics then have the same bits in every process.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]

    def forward_of(layer: _BatchNorm) -> Any:
        return lambda inputs: _forward(layer, inputs, processes)

    try:
        for layer in layers:
            layer.__dict__["forward"] = forward_of(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _forward(layer: _BatchNorm, inputs: Tensor, processes: Processes) -> Tensor:
    if not layer.training:
        plain: Tensor = type(layer).forward(layer, inputs)
        return plain
    wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    shape = [-1 if axis == 1 else 1 for axis in range(inputs.ndim)]
    own_mean = wide.mean(axes)
    own_m2 = (wide - own_mean.view(shape)).square().sum(axes)
    own_count = own_mean.new_full((1,), inputs.numel() // inputs.shape[1])
    everyone: Tensor = _Gather.apply(  # type: ignore[no-untyped-call]
        torch.cat([own_count, own_mean, own_m2]), processes
    )
    counts, means, m2s = everyone.split([1, len(own_mean), len(own_m2)], 1)  # (ranks, 1), (ranks, C) twice
    counts = counts.detach()
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    m2 = m2s.sum(0) + (counts * (means - mean).square()).sum(0)
    outputs = (wide - mean.view(shape)) * (m2 / count + layer.eps).rsqrt().view(shape)
    if layer.weight is not None:
        outputs = outputs * layer.weight.view(shape)
    if layer.bias is not None:
        outputs = outputs + layer.bias.view(shape)
    _follow(layer, mean.detach(), m2.detach() / (count - 1))
    narrow: Tensor = outputs.to(inputs.dtype)
    return narrow


@torch.no_grad()
def _follow(layer: _BatchNorm, mean: Tensor, unbiased_var: Tensor) -> None:
    """One update of the running statistics, as PyTorch does it."""
    if layer.running_mean is None or layer.running_var is None or layer.num_batches_tracked is None:
        return
    layer.num_batches_tracked.add_(1)
    share = 1 / int(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    for running, new in ((layer.running_mean, mean), (layer.running_var, unbiased_var)):
        running.copy_(running.double() * (1 - share) + new.double() * share)


class _Gather(torch.autograd.Function):
    """Numbers (n,) of every process, (num_ranks, n); the gradient of each is summed over all."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.gather(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        total = gradient.clone(memory_format=torch.contiguous_format)
        with ctx.processes.exchanging():
            dist.all_reduce(total)
        return total[ctx.processes.rank], None
