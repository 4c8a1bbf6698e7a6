"""Which BatchNorm layers a measurement takes, and why it leaves the others alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bncli.batchnorm.layers import batch_norm_layers
from bncli.errors import BncliError
from bncli.wording import list_names

Layers = str | Callable[[str], bool] | None  # a glob such as "stages.1.*", a predicate, or None: all


@dataclass(frozen=True)
class SkippedLayer:
    """A BatchNorm layer that was asked for and left alone."""

    name: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """The layers to measure, in model order, and those that cannot be."""

    layers: dict[str, _BatchNorm]
    skipped: tuple[SkippedLayer, ...]


def select_layers(model: nn.Module, layers: Layers = None) -> Selection:
    """The BatchNorm layers whose names match, except those that must be left alone.

    Left alone are layers without running statistics, layers that are not built yet, and frozen ones: a
    layer in eval mode inside a model in train mode was put there on purpose. In a model that is in eval
    mode as a whole no layer counts as frozen; name those to leave alone with `layers`. Classes such as
    FrozenBatchNorm2d, which never update their statistics, are named and left alone in any mode.

    Raises BncliError if nothing is left to measure.
    """
    found = batch_norm_layers(model)
    matches = layers if callable(layers) else partial(name_matches, layers)
    chosen: dict[str, _BatchNorm] = {}
    skipped = [SkippedLayer(name, reason) for name, reason in _frozen_layers(model) if matches(name)]
    for name, layer in found:
        if matches(name):
            reason = _why_not(layer, frozen=model.training and not layer.training)
            if reason is None:
                chosen[name] = layer
            else:
                skipped.append(SkippedLayer(name, reason))
    if not chosen:
        raise BncliError(_nothing_left(layers, found, skipped))
    return Selection(chosen, tuple(skipped))


def by_reason(skipped: Sequence[SkippedLayer]) -> list[str]:
    """One sentence for each reason, with the names of all that it holds for."""
    sentences = []
    for reason in dict.fromkeys(one.reason for one in skipped):
        names = [one.name for one in skipped if one.reason == reason]
        sentences.append(f"{list_names(names)}{'; each' if len(names) > 1 else ''} {reason}")
    return sentences


def _why_not(layer: _BatchNorm, *, frozen: bool) -> str | None:
    if layer.running_mean is None or layer.running_var is None:
        return "has no running statistics"
    if is_lazy(layer.running_mean):
        return "is not built yet"
    return "is frozen: in eval mode inside a model in train mode" if frozen else None


def _frozen_layers(model: nn.Module) -> list[tuple[str, str]]:
    """Layers of classes that are called frozen and keep statistics as BatchNorm does, with the reason."""
    return [
        (name, f"is frozen: a {type(module).__name__} never updates its statistics")
        for name, module in model.named_modules()
        if "Frozen" in type(module).__name__ and hasattr(module, "running_var")
    ]


def _nothing_left(layers: Layers, found: list[tuple[str, _BatchNorm]], skipped: list[SkippedLayer]) -> str:
    if skipped:
        return f"no BatchNorm layer to measure: {'; '.join(by_reason(skipped))}"
    if not found:
        return "the model has no BatchNorm layer"
    wanted = repr(layers) if isinstance(layers, str) else "the given predicate"
    return no_match(wanted, [name for name, _ in found])


def name_matches(pattern: str | None, name: str) -> bool:
    """Whether a glob such as 'stages.1.*' means the layer; every one is meant without a glob."""
    return pattern is None or fnmatchcase(name, pattern)


def no_match(wanted: str, names: Sequence[str]) -> str:
    """What is wrong with names that mean no layer, and which there are."""
    return f"no BatchNorm layer matches {wanted}; there are {list_names(names) or 'none'}"
