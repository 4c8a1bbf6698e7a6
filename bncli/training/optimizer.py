"""Stochastic gradient descent and its learning rate schedule."""

import math

import torch
from torch import nn

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
