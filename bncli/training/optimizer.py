"""The optimiser: SGD for everything, or Muon for the convolutions and SGD for the rest; and its schedule.

It is no `torch.optim.Optimizer`: making one imports the compiler of PyTorch, which takes as long as importing
torch itself (measured: 1.05 s, and 1.0 s). SGD calls the function behind `torch.optim.SGD`; Muon has the bits
of `torch.optim.Muon`.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd
from torch.optim.sgd import sgd

from bncli.config import TrainConfig

_NEWTON_SCHULZ_STEPS = 3  # enough for filters (Jordan 2024, airbench94_muon); PyTorch's default is 5
_SMALLEST_NORM = 1e-30  # filters may begin at 0
# f(s * x + b) = s * f(x) + b for s > 0: always true of these, and without b of the others
_ALWAYS = (_MaxPoolNd, _AdaptiveMaxPoolNd, nn.Identity)
_WITHOUT_BIAS = (nn.ReLU, nn.LeakyReLU, _AvgPoolNd, _AdaptiveAvgPoolNd, _DropoutNd)
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic: the steepest at 0 that stays bounded


class Optimizer:
    """SGD with (Nesterov) momentum, and Muon for the groups that say so.

    `param_groups` are dicts as PyTorch's optimisers have them: `params`, `lr`, `weight_decay`, and `muon`, a
    bool. Added is `initial_lr`, the peak of the group's learning rate. Muon takes filters (out, in, h, w) as
    matrices (out, in*h*w), and has no weight decay.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]], *, momentum: float, nesterov: bool) -> None:
        self.param_groups = [{**group, "initial_lr": group["lr"]} for group in param_groups]
        self.momentum = momentum
        self.nesterov = nesterov
        # by group, one for each weight
        self._momenta: list[list[Tensor | None]] = [
            [None] * len(group["params"]) for group in self.param_groups
        ]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every weight along its gradient."""
        for group, momenta in zip(self.param_groups, self._momenta, strict=True):
            if group["muon"]:
                for index, weight in enumerate(group["params"]):
                    if weight.grad is not None:
                        momenta[index] = self._turn(weight, momenta[index], group["lr"])
            else:
                # of a layer that the network left out there is none, as with PyTorch's optimisers
                used = [index for index, weight in enumerate(group["params"]) if weight.grad is not None]
                own = [momenta[index] for index in used]
                sgd(
                    [group["params"][index] for index in used],
                    [group["params"][index].grad for index in used],
                    own,  # filled in the first step
                    foreach=True,
                    weight_decay=group["weight_decay"],
                    momentum=self.momentum,
                    lr=group["lr"],
                    dampening=0.0,
                    nesterov=self.nesterov,
                    maximize=False,
                )
                for index, momentum in zip(used, own, strict=True):
                    momenta[index] = momentum

    def _turn(self, filters: Tensor, momentum: Tensor | None, lr: float) -> Tensor:
        """Muon's step on the filters (out, in, h, w) of one layer; the new momentum (out, in*h*w).

        Before it the filters are scaled to the norm sqrt(out). BatchNorm divides by that scale again, so it
        changes no output, but it fixes how far a step turns them (Jordan 2024, airbench).
        """
        assert filters.grad is not None
        matrix, gradient = _as_matrix(filters, filters), _as_matrix(filters.grad, filters)
        matrix.mul_(math.sqrt(len(matrix)) / matrix.norm().clamp(min=_SMALLEST_NORM))
        momentum = torch.zeros_like(gradient) if momentum is None else momentum
        momentum.lerp_(gradient, 1 - self.momentum)
        direction = gradient.lerp(momentum, self.momentum) if self.nesterov else momentum
        rows, columns = matrix.shape
        matrix.add_(orthogonalize(direction), alpha=-lr * math.sqrt(max(1, rows / columns)))
        return momentum

    def momenta(self) -> list[Tensor]:
        """The optimiser's own tensors, one for each weight that had a gradient yet."""
        return [momentum for group in self._momenta for momentum in group if momentum is not None]

    def had_gradients(self) -> list[bool]:
        """By weight, over all groups, whether it has a momentum: it had a gradient in some step."""
        return [momentum is not None for group in self._momenta for momentum in group]

    def forget_momenta(self, kept: Iterable[bool] = ()) -> None:
        """Go back to the state before the first step, but for the weights that are `kept`."""
        keeps = iter(kept)
        self._momenta = [
            [momentum if next(keeps, False) else None for momentum in group] for group in self._momenta
        ]

    def state_dict(self) -> dict[str, Any]:
        """In the layout of PyTorch's optimisers; weights are numbered over all groups."""
        momenta = list(enumerate(momentum for group in self._momenta for momentum in group))
        numbers = iter(range(len(self._matrices())))
        groups = [{**g, "params": [next(numbers) for _ in g["params"]]} for g in self.param_groups]
        # without momentum, and before the first step, there are none; None is of a weight without a gradient
        state = {number: {"momentum_buffer": tensor} for number, tensor in momenta} if self.momenta() else {}
        return {"state": state, "param_groups": groups}

    def load_momenta(self, state_dict: dict[str, Any]) -> None:
        """Put the momentum of a saved state dict back; all else is the configuration's.

        Raises:
            KeyError, TypeError, ValueError: when it is no such state dict, or that of another network.
        """
        state = state_dict["state"]
        matrices = self._matrices()
        # all of them or, without momentum, none: a step that is undone writes back as many as it kept
        if not isinstance(state, dict) or set(state) not in ({*range(len(matrices))}, set()):
            raise ValueError(f"the optimizer's state is not that of {len(matrices)} weights")
        for index, entry in state.items():
            momentum, weight = entry["momentum_buffer"], matrices[index]
            is_like = momentum is None or (
                isinstance(momentum, Tensor)
                and (momentum.shape, momentum.dtype) == (weight.shape, weight.dtype)
            )
            if len(entry) != 1 or not is_like:
                raise ValueError(f"momentum {index} of the optimizer is not like its weight")
        momenta = (state[index]["momentum_buffer"] if state else None for index in range(len(matrices)))
        saved = (
            None if momentum is None else torch.empty_like(weight).copy_(momentum)
            for weight, momentum in zip(matrices, momenta, strict=True)
        )
        self._momenta = [[next(saved) for _ in group["params"]] for group in self.param_groups]

    def _matrices(self) -> list[Tensor]:
        """Every weight in the shape of its momentum."""
        return [
            _as_matrix(weight.detach(), weight) if group["muon"] else weight.detach()
            for group in self.param_groups
            for weight in group["params"]
        ]


def orthogonalize(matrix: Tensor) -> Tensor:
    """A matrix (rows, columns) with its singular values brought close to 1, in bfloat16: Newton-Schulz.

    Muon's direction (Jordan 2024). The iteration runs on the shorter side.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def _as_matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """(out, in, h, w) as (out, in*h*w), the columns in the order in which `like` lies in memory.

    So the matrix of `like` itself is a view of it. Muon does not depend on the order of the columns.
    """
    is_channels_last = like.is_contiguous(memory_format=torch.channels_last)
    return (tensor.permute(0, 2, 3, 1) if is_channels_last else tensor).flatten(1)


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Muon, if asked for, and SGD; both with (Nesterov) momentum, and weight decay on weights only.

    BatchNorm's weight and bias and all other biases are one-dimensional; they get no weight decay,
    which would pull BatchNorm's gain towards 0 without regularising anything. Nor do Muon's filters,
    whose scale is fixed. Muon's are the weights of two-dimensional convolutions whose output is normalised:
    there alone the scale is nothing that the network could need.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = _head_of(model)
    weights = [parameter for parameter in trained if not _is_vector(parameter) and parameter is not head]
    is_muon = config.optimizer == "muon"
    # a group of their own with SGD too: checkpoints number weights by groups
    four = {parameter for parameter in weights if parameter.ndim == 4}
    turned = four & _normalized_filters(model) if is_muon else four
    filters = [parameter for parameter in weights if parameter in turned]
    others = [parameter for parameter in weights if parameter not in turned]
    heads = [parameter for parameter in trained if parameter is head]
    vectors = [parameter for parameter in trained if _is_vector(parameter) and parameter is not head]
    rate, decay = config.learning_rate, config.weight_decay
    groups = [
        (filters, rate, 0.0 if is_muon else decay, is_muon),
        (others, rate, decay, False),
        (heads, config.head_learning_rate or rate, decay, False),
        (vectors, config.bias_learning_rate or rate, 0.0, False),
    ]
    keys = ("params", "lr", "weight_decay", "muon")
    return Optimizer(
        [dict(zip(keys, group, strict=True)) for group in groups if group[0]],
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
    )


def _head_of(model: nn.Module) -> Tensor | None:
    """The weight of the last linear layer or convolution, in the order of the network's definition."""
    weights = [module.weight for module in model.modules() if isinstance(module, (nn.Linear, _ConvNd))]
    return weights[-1] if weights else None


def _normalized_filters(model: nn.Module) -> set[Tensor]:
    """The weights of convolutions that a BatchNorm or InstanceNorm layer follows in the same module.

    By the order of definition, past layers that a scale passes through, such as pooling and, without a bias,
    ReLU. So a convolution before a GELU is none, nor one at the end of a block, whose output is added to
    another one and normalised later.
    """
    found: set[Tensor] = set()
    for module in model.modules():
        last: nn.Conv2d | None = None
        for layer in module.children():
            if isinstance(layer, _NormBase) and last is not None:
                found.add(last.weight)
            passes = isinstance(layer, _ALWAYS)
            if last is not None and last.bias is None:
                passes |= isinstance(layer, _WITHOUT_BIAS)
            if not passes:
                last = layer if isinstance(layer, nn.Conv2d) else None
    return found


def _is_vector(parameter: Tensor) -> bool:
    """Whether it has one dimension in all but shape, as the scales (C, 1, 1) of a layer have."""
    return parameter.ndim <= 1 or (parameter.ndim != 2 and parameter.numel() == max(parameter.shape))


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
