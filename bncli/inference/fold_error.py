"""What folding cost in numbers, layer by layer: errors beside float64, and the gain that magnifies them.

Each BatchNorm layer and the layer that took it in are computed three times from the same input: as they were,
folded, and in float64. So an error is that of this pair alone, not of all before it. The reference keeps
BatchNorm as it was, and knows nothing of folding.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.batchnorm.modes import eval_mode, preserved_buffers
from bncli.inference.fold import FoldedLayer

# of 5 % in the output, at which BN007 of the audit begins to speak: float16 rounds by 5 % at a gain of 100
MAX_ROUNDING = 0.05
GAIN_PER_MEDIAN = 30.0  # as in BN007: the scale of a whole layer is free


@dataclass(frozen=True)
class FoldError:
    """Of one layer that was folded. Errors are the largest, in units of the output's root mean square."""

    name: str
    into: str
    gain: float  # the largest slope of a channel, |weight| / sqrt(running_var + eps)
    gain_per_median: float
    error: float  # folded, beside float64
    error_unfolded: float  # as it was, beside float64
    carries: bool  # whether the precision has the digits for such a gain

    @property
    def added(self) -> float:
        """What folding added to the error; below 0 where it took away."""
        return self.error - self.error_unfolded


def fold_errors(
    model: nn.Module,
    folded: nn.Module,
    layers: Sequence[FoldedLayer],
    images: Tensor,
    precision: torch.dtype = torch.float32,
) -> tuple[FoldError, ...]:
    """Measure on images (N, ...): `model` as it was, and its folded copy, which may be in another precision.

    Both are left as they were. Memory: the inputs and outputs of the folded layers, for all images.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        groups[layer.into].append(layer.name)
    watched = {name for into, names in groups.items() for name in (into, *names)}
    plain = _run(model, watched, images)
    ends = {into: _ends([into, *names], plain.order) for into, names in groups.items()}
    given = {first: plain.inputs[first] for first, _ in ends.values()}
    wanted = {last for _, last in ends.values()}
    exact = _run(_as_float64(model), wanted, images, given).outputs
    after = _run(folded, wanted, images, given).outputs
    errors: list[FoldError] = []
    for layer in layers:
        _, last = ends[layer.into]
        gain, per_median = _gain(model.get_submodule(layer.name))
        errors.append(
            FoldError(
                name=layer.name,
                into=layer.into,
                gain=gain,
                gain_per_median=per_median,
                error=_error(after[last], exact[last]),
                error_unfolded=_error(plain.outputs[last], exact[last]),
                carries=carries(gain, per_median, precision),
            )
        )
    return tuple(errors)


def carries(gain: float, gain_per_median: float, precision: torch.dtype) -> bool:
    """Whether a precision has the digits for a gain: it multiplies the rounding of what comes in."""
    unit = torch.finfo(precision).eps / 2
    return gain * unit <= MAX_ROUNDING or gain_per_median <= GAIN_PER_MEDIAN


def _gain(norm: Any) -> tuple[float, float]:
    """The largest of the channels, and in medians of the layer."""
    slope = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        slope = slope * norm.weight.detach().double().abs()
    most, median = float(slope.max()), float(slope.median())
    return most, most / median if median > 0 else float("inf") if most else 1.0


def _ends(names: Sequence[str], order: Mapping[str, int]) -> tuple[str, str]:
    """Which of a group is called first, and which last."""
    return min(names, key=order.__getitem__), max(names, key=order.__getitem__)


def _error(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    worst = 0.0
    for found, right in zip(outputs, exact, strict=True):
        scale = float(right.square().mean().sqrt()) or 1.0
        worst = max(worst, float((found.double() - right).abs().max()) / scale)
    return worst


def _as_float64(model: nn.Module) -> nn.Module:
    """A copy whose layers also take what code outside of them leaves in float32: a hook that normalises."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if next(module.parameters(recurse=False), None) is not None or isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(_widen)
    return twin


def _widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    )


@dataclass(frozen=True)
class _Seen:
    order: dict[str, int]  # of the last call of each
    inputs: dict[str, list[Tensor]]  # of every call
    outputs: dict[str, list[Tensor]]


def _run(
    model: nn.Module, watched: set[str], images: Tensor, given: Mapping[str, list[Tensor]] | None = None
) -> _Seen:
    """Compute the images once; what `given` says goes into a layer in place of what reaches it."""
    seen = _Seen({}, defaultdict(list), defaultdict(list))
    with (
        eval_mode(model),
        preserved_buffers(model),
        torch.no_grad(),
        _watching(model, watched, seen, given or {}),
    ):
        model(images)
    return seen


@contextmanager
def _watching(
    model: nn.Module, watched: set[str], seen: _Seen, given: Mapping[str, list[Tensor]]
) -> Iterator[None]:
    handles = []
    try:
        for name in watched | set(given):
            module = model.get_submodule(name)
            # the first to see the input, before what casts it
            handles.append(
                module.register_forward_pre_hook(_before(name, seen, given.get(name)), prepend=True)
            )
            handles.append(module.register_forward_hook(_after(name, seen)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(name: str, seen: _Seen, given: list[Tensor] | None) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        number = len(seen.inputs[name])
        seen.inputs[name].append(inputs[0].clone())
        seen.order[name] = sum(map(len, seen.inputs.values()))
        return None if given is None else (given[number], *inputs[1:])

    return hook


def _after(name: str, seen: _Seen) -> Callable[..., None]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        seen.outputs[name].append(output.clone())  # an activation behind it may write into it

    return hook
