"""Stochastic gradient descent and its learning rate schedule."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from bncli.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with (Nesterov) momentum, and weight decay on weights only.

    BatchNorm's weight and bias and all other biases are one-dimensional; they get no weight decay,
    which would pull BatchNorm's gain towards 0 without regularising anything.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.ndim > 1],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [parameter for parameter in parameters if parameter.ndim <= 1],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.SGD(
        groups,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
    )


def load_momenta(optimizer: torch.optim.SGD, state_dict: dict[str, Any]) -> None:
    """Put the momentum of a saved state dict back; all else of the optimiser is the configuration's.

    Raises:
        KeyError, TypeError, ValueError: when it is no such state dict, or that of another network.
    """
    state, groups = state_dict["state"], optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # all of them or, without momentum, none: a step that is undone writes back as many as it kept
    if not isinstance(state, dict) or set(state) not in ({*range(len(parameters))}, set()):
        raise ValueError(f"the optimizer's state is not that of {len(parameters)} weights")
    for index, entry in state.items():
        buffer, weight = entry["momentum_buffer"], parameters[index]
        is_like = isinstance(buffer, Tensor) and (buffer.shape, buffer.dtype) == (weight.shape, weight.dtype)
        if len(entry) != 1 or not is_like:
            raise ValueError(f"momentum {index} of the optimizer is not like its weight")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def learning_rate_at(step: int, num_steps: int, config: TrainConfig) -> float:
    """The learning rate of step `step` of `num_steps`: a linear warm-up, then the decay to 0.

    A function of the step alone, so that a resumed run continues it exactly.
    """
    progress = (step + 0.5) / num_steps  # of the middle of the step, so that no step has rate 0
    if progress < config.warmup:
        return config.learning_rate * progress / config.warmup
    left = (1 - progress) / (1 - config.warmup)  # 1 at the peak, 0 at the end
    if config.decay == "linear":
        return config.learning_rate * left
    if config.decay == "cosine":
        return config.learning_rate * 0.5 * (1 - math.cos(math.pi * left))
    return config.learning_rate
