"""The optimiser: SGD for everything, or Muon for the convolutions and SGD for the rest; and its schedule."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bncli.config import TrainConfig

_NEWTON_SCHULZ_STEPS = 3  # enough for filters (Jordan 2024, airbench94_muon); PyTorch's default is 5


class FilterMuon(torch.optim.Muon):
    """PyTorch's Muon on the filters of convolutions, each (out, in, h, w) taken as a matrix (out, in*h*w).

    Before every step a layer's filters are scaled to the norm sqrt(out). BatchNorm divides by that
    scale again, so it changes no output, but it fixes how far a step turns them (Jordan 2024, airbench).
    """

    def __init__(
        self, filters: Iterable[nn.Parameter], *, lr: float, momentum: float, nesterov: bool
    ) -> None:
        self._filters = list(filters)
        super().__init__(
            [_as_matrix(weight.detach(), weight) for weight in self._filters],
            lr=lr,
            weight_decay=0.0,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=_NEWTON_SCHULZ_STEPS,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the filters."""
        super().zero_grad(set_to_none)
        for weight in self._filters:
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take the filters' gradients, scale the filters, and step."""
        matrices = self.param_groups[0]["params"]
        for weight, matrix in zip(self._filters, matrices, strict=True):
            matrix.grad = None if weight.grad is None else _as_matrix(weight.grad, weight)
            matrix.mul_(math.sqrt(len(matrix)) / matrix.norm())
        return super().step(closure)  # type: ignore[no-untyped-call]


def _as_matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """(out, in, h, w) as (out, in*h*w), the columns in the order in which `like` lies in memory.

    So the matrix of `like` itself is a view of it. Muon does not depend on the order of the columns.
    """
    is_channels_last = like.is_contiguous(memory_format=torch.channels_last)
    return (tensor.permute(0, 2, 3, 1) if is_channels_last else tensor).flatten(1)


class Optimizers:
    """Several optimisers, each with weights of its own, used as if they were one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]  # the peak of its learning rate

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all, one after the other."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        """Take the step of each."""
        for part in self.parts:
            part.step()

    def momenta(self) -> list[Tensor]:
        """The optimisers' own tensors, one for each trained weight; none before the first step."""
        states = [state for part in self.parts for state in part.state.values()]
        return [state["momentum_buffer"] for state in states if state.get("momentum_buffer") is not None]

    def forget_momenta(self) -> None:
        """Go back to the state before the first step."""
        for part in self.parts:
            part.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """As of one optimiser with all groups, so that checkpoints do not depend on how many there are."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0  # number of the part's first weight
        for part in self.parts:
            own = part.state_dict()
            state |= {first + index: entry for index, entry in own["state"].items()}
            groups += [
                {**group, "params": [first + index for index in group["params"]]}
                for group in own["param_groups"]
            ]
            first += len(_weights_of(part))
        return {"state": state, "param_groups": groups}

    def load_momenta(self, state_dict: dict[str, Any]) -> None:
        """Put the momentum of a saved state dict back; all else is the configuration's.

        Raises:
            KeyError, TypeError, ValueError: when it is no such state dict, or that of another network.
        """
        state = state_dict["state"]
        weights = [weight for part in self.parts for weight in _weights_of(part)]
        # all of them or, without momentum, none: a step that is undone writes back as many as it kept
        if not isinstance(state, dict) or set(state) not in ({*range(len(weights))}, set()):
            raise ValueError(f"the optimizer's state is not that of {len(weights)} weights")
        for index, entry in state.items():
            buffer, weight = entry["momentum_buffer"], weights[index]
            is_like = isinstance(buffer, Tensor) and (buffer.shape, buffer.dtype) == (
                weight.shape,
                weight.dtype,
            )
            if len(entry) != 1 or not is_like:
                raise ValueError(f"momentum {index} of the optimizer is not like its weight")
        first = 0
        for part in self.parts:
            count = len(_weights_of(part))
            own = {index: state[first + index] for index in range(count) if state}
            part.load_state_dict({"state": own, "param_groups": part.state_dict()["param_groups"]})
            first += count


def _weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizers:
    """Muon, if asked for, and SGD; both with (Nesterov) momentum, and weight decay on weights only.

    BatchNorm's weight and bias and all other biases are one-dimensional; they get no weight decay,
    which would pull BatchNorm's gain towards 0 without regularising anything. Nor do Muon's filters,
    whose scale is fixed.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    filters = [parameter for parameter in trained if parameter.ndim == 4]
    matrices = [parameter for parameter in trained if 1 < parameter.ndim < 4]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    nesterov = config.nesterov and config.momentum > 0
    rate = config.learning_rate
    parts: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        parts.append(FilterMuon(filters, lr=rate, momentum=config.momentum, nesterov=nesterov))
        filters = []
    groups = [
        {"params": filters, "lr": rate, "weight_decay": config.weight_decay},
        {"params": matrices, "lr": config.head_learning_rate or rate, "weight_decay": config.weight_decay},
        {"params": vectors, "lr": config.bias_learning_rate or rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    parts.append(torch.optim.SGD(groups, momentum=config.momentum, nesterov=nesterov))
    return Optimizers(parts)


def learning_rate_at(step: int, num_steps: int, config: TrainConfig) -> float:
    """The learning rate of step `step` of `num_steps`, at its peak `config.learning_rate`."""
    return config.learning_rate * schedule_at(step, num_steps, config)


def schedule_at(step: int, num_steps: int, config: TrainConfig) -> float:
    """The share of its peak that every learning rate has in a step: a linear warm-up, then the decay to 0.

    A function of the step alone, so that a resumed run continues it exactly.
    """
    progress = (step + 0.5) / num_steps  # of the middle of the step, so that no step has rate 0
    if progress < config.warmup:
        return progress / config.warmup
    left = (1 - progress) / (1 - config.warmup)  # 1 at the peak, 0 at the end
    if config.decay == "linear":
        return left
    if config.decay == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return 1.0
