"""What enters one channel of a BatchNorm layer, image by image: what statistics of batches are made of.

Kept are the mean and variance of each image, from which those of any batch follow exactly, and one value of
each image, drawn at random among its positions: batches of such values are what a layer behind global
pooling or a linear layer sees.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batches import Batches, inputs_of
from bncli.batchnorm.layers import batch_norm_layers, float64_statistics
from bncli.batchnorm.modes import eval_mode, not_compiled, preserved_buffers
from bncli.batchnorm.population.hooks import input_of_call
from bncli.distributed.wrapped import as_written
from bncli.errors import BncliError
from bncli.forward import model_device


@dataclass(frozen=True, eq=False)
class RecordedChannel:
    """One channel's input in eval mode, for N images; float64 tensors of shape (N,) on the CPU."""

    layer: str
    channel: int  # from 0
    num_positions: int  # values of an image in the channel: height times width, or 1
    values: Tensor  # one of each image, at a random position
    means: Tensor  # of each image
    variances: Tensor  # of each image, biased
    running_mean: float  # of the layer
    running_var: float
    momentum: float | None  # weight of the new batch; None: cumulative average
    num_batches_tracked: int | None

    @property
    def population_mean(self) -> float:
        """Of all values of all images."""
        return float(self.means.mean())

    @property
    def population_variance(self) -> float:
        """Of all values of all images, biased."""
        return float(self.variances.mean() + self.means.var(correction=0))


def record_channel(
    model: nn.Module, batches: Batches, layer: str, *, channel: int | None = None, seed: int = 0
) -> RecordedChannel:
    """Compute images in eval mode and keep what enters one channel of the layer of that name.

    Without `channel` it is the one whose running statistics are farthest from its input. Modes, buffers and
    hooks are restored. Of a layer that is called several times for a batch the first call counts.

    Raises BncliError where there is no such layer, it keeps no running statistics, or no image reaches it.
    """
    model = as_written(model)
    module = dict(batch_norm_layers(model)).get(layer)
    if module is None or module.running_mean is None:
        raise BncliError(f"there is no BatchNorm layer {layer!r} with running statistics")
    found = _record(model, module, batches, torch.Generator().manual_seed(seed))
    if found is None:
        raise BncliError(f"no image reaches the layer {layer!r}")
    values, means, variances, num_positions = found
    mean, var = float64_statistics(module)
    if channel is None:
        channel = _farthest(means, variances, mean, var, module.eps)
    tracked = module.num_batches_tracked
    return RecordedChannel(
        layer=layer,
        channel=channel,
        num_positions=num_positions,
        values=values[:, channel].clone(),
        means=means[:, channel].clone(),
        variances=variances[:, channel].clone(),
        running_mean=float(mean[channel]),
        running_var=float(var[channel]),
        momentum=module.momentum,
        num_batches_tracked=None if tracked is None else int(tracked),
    )


def _record(
    model: nn.Module, layer: _BatchNorm, batches: Batches, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, int] | None:
    """Values, means and variances, each (N, C), and the positions of an image; None: nothing was seen."""
    values, means, variances, positions = [], [], [], 0
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append(input_of_call(args, kwargs).detach())

    with preserved_buffers(model), eval_mode(model), not_compiled(), torch.no_grad():
        handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for inputs in inputs_of(batches):
                seen.clear()
                model(inputs.to(model_device(model), non_blocking=True))
                for x in seen:
                    flat = x.double().cpu().flatten(2) if x.ndim > 2 else x.double().cpu().unsqueeze(2)
                    positions = flat.shape[2]
                    at = torch.randint(positions, (len(flat), 1, 1), generator=generator)
                    values.append(flat.gather(2, at.expand(-1, flat.shape[1], 1)).squeeze(2))
                    means.append(flat.mean(2))
                    variances.append(flat.var(2, correction=0))
        finally:
            handle.remove()
    if not values:
        return None
    return torch.cat(values), torch.cat(means), torch.cat(variances), positions


def _farthest(means: Tensor, variances: Tensor, mean: Tensor, var: Tensor, eps: float) -> int:
    """The channel whose running statistics are farthest from its input, of those whose input varies.

    What is no number is farthest of all, unless the input is none either.
    """
    spread = variances.mean(0) + means.var(0, correction=0)
    shift = (mean - means.mean(0)).square() / (spread + eps)
    ratio = ((var + eps) / (spread + eps)).log().square()
    distance = (shift + ratio).nan_to_num(torch.inf, posinf=torch.inf)
    distance = distance.masked_fill(~spread.isfinite() | (spread <= eps), -1.0)
    return int(distance.argmax())
