"""BatchNorm folded into the layer next to it, which eval mode makes possible: one layer less to compute.

In eval mode BatchNorm is one affine map per channel. A convolution or linear layer with such a map behind it
is again one; so is one with the map ahead of it, unless it pads with zeros. Average pooling in between
changes nothing about that (its weights sum to 1), nor does max pooling where the map increases. Folding
changes the last bits of every output.

What is next to what is read from the network's code (`module_flow`). A layer is folded only if every call of
it, and of the layer that takes it in, is seen and is next to a call of the other.
"""

import copy
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from bncli.batchnorm.layers import batch_norm_layers
from bncli.errors import BncliError
from bncli.inference.folded_layers import (
    EvalNorm,
    folded_ahead,
    folded_behind,
    is_passable,
    is_plain_norm,
    problem_of_norm,
    problem_of_pair,
    problem_of_passing,
    remove_norm,
    set_weights,
)
from bncli.inference.module_flow import ModuleFlow, follow_modules, layer_of
from bncli.inference.stand_in import describe, input_of, modules_behind, users_of

_NUM_NAMES = 3  # of the layers that are kept for one reason, in print


@dataclass(frozen=True)
class FoldedLayer:
    """A BatchNorm layer that is gone."""

    name: str
    into: str  # the layer that computes it now


@dataclass(frozen=True)
class KeptLayer:
    """A BatchNorm layer that stays."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Folding:
    """A network whose BatchNorm layers are folded away where that is right."""

    model: nn.Module = field(repr=False)  # the copy, in eval mode
    folded: tuple[FoldedLayer, ...]  # in model order, as `kept`
    kept: tuple[KeptLayer, ...]

    @property
    def num_layers(self) -> int:
        """BatchNorm layers that the network had."""
        return len(self.folded) + len(self.kept)

    def __str__(self) -> str:
        """How many were folded, and one line for each reason why others were not."""
        lines = [f"{len(self.folded):,} of {self.num_layers:,} BatchNorm layers folded"]
        names = defaultdict(list)
        for layer in self.kept:
            names[layer.reason].append(layer.name)
        for reason, those in sorted(names.items(), key=lambda item: -len(item[1])):
            more = f" and {len(those) - _NUM_NAMES:,} more" if len(those) > _NUM_NAMES else ""
            lines.append(f"{len(those):,} kept: {reason} ({', '.join(those[:_NUM_NAMES])}{more})")
        return "\n".join(lines)


def fold_batch_norm(model: nn.Module) -> Folding:
    """Return a copy in eval mode whose BatchNorm layers are folded away, and say which are not and why.

    `model` is left alone. A layer is folded into the convolution, transposed convolution or linear layer
    before it, or else into the linear layer or unpadded convolution after it; also through a pooling where
    that is exact. An `nn.Identity` takes its place, or an `nn.Sequential` of what else it did (the
    activation in timm's `BatchNormAct2d`). Weights are computed in float64 and rounded once to their type;
    one that was shared with another layer is shared no more.

    What is seen, by torch.fx, is the code that `model(inputs)` runs in eval mode: no other method, and
    optional arguments at their defaults. Nothing is computed; meanwhile there are two copies in memory.

    Raises BncliError for a model that cannot be copied, or is not built yet. The copy itself raises it where
    BatchNorm1d was folded into `nn.Linear`, say, and an input is not (N, C) but (N, C, L), where the two mean
    other axes.
    """
    network = _Network.copy_of(model)
    into: dict[str, str] = {}
    reasons: dict[str, str] = {}
    names = [name for name, _ in batch_norm_layers(network.model)]
    num_folded = -1
    while len(into) > num_folded:  # again, since a layer that is gone brings others together
        num_folded = len(into)
        for name in names:
            if name not in into:
                try:
                    into[name] = _fold(network, name)
                except _KeptError as error:
                    reasons[name] = str(error)
    return Folding(
        model=network.model,
        folded=tuple(FoldedLayer(name, into[name]) for name in names if name in into),
        kept=tuple(KeptLayer(name, reasons[name]) for name in names if name not in into),
    )


class _KeptError(Exception):
    """Why a layer is kept. `beside` says what is next to it, where that is no layer that could take it in."""

    def __init__(self, reason: str, beside: str | None = None) -> None:
        super().__init__(reason)
        self.beside = beside


@dataclass(frozen=True)
class _Network:
    """The copy that is being changed, and what is known of it."""

    model: nn.Module
    layers: dict[str, nn.Module]  # by name, as they are now
    flow: ModuleFlow

    @classmethod
    def copy_of(cls, model: nn.Module) -> "_Network":
        """A copy of this network in eval mode. Raises BncliError where there can be none."""
        for part in model.modules():
            if isinstance(part, LazyModuleMixin) and part.has_uninitialized_params():
                kind = type(part).__name__
                raise BncliError(
                    f"the model has a {kind} that is not built yet: run one batch through it first"
                )
        try:
            copied = copy.deepcopy(model)
        except Exception as error:  # whatever a part of it says
            raise BncliError(f"the model cannot be copied: {error}") from error
        if set(map(id, copied.modules())) & set(map(id, model.modules())):
            raise BncliError("the model cannot be copied: a module of it gives itself as its copy")
        copied.eval()
        return cls(copied, dict(copied.named_modules()), follow_modules(copied))

    def calls_of(self, name: str) -> tuple[fx.Node, ...]:
        """All calls of a layer. Raises _KeptError unless all are seen, and nothing but calls takes it."""
        if name in self.flow.out_of_sight:
            raise _KeptError(self.flow.out_of_sight[name])
        if name in self.flow.read_directly:
            raise _KeptError("code outside reads the weights or statistics")
        calls = tuple(self.flow.calls.get(name, ()))
        if not calls:
            raise _KeptError("the network does not call it in eval mode")
        return calls


def _fold(network: _Network, name: str) -> str:
    """Fold one layer, and return the name of the layer that took it in. Raises _KeptError."""
    norm: Any = network.layers[name]
    problem = problem_of_norm(norm)
    if problem is not None:
        raise _KeptError(f"it {problem}")
    behind = {} if is_plain_norm(norm) else modules_behind(norm)
    if behind is None:
        raise _KeptError(f"it is a {type(norm).__name__}, which computes in a way of its own")
    calls = network.calls_of(name)
    try:
        into = _neighbour(network, norm, calls, is_before=True)
        layer: Any = network.layers[into]
        weights = folded_behind(layer, EvalNorm.of(norm))
    except _KeptError as before:
        try:
            if behind:
                raise _KeptError("", beside="its own activation")
            into = _neighbour(network, norm, calls, is_before=False)
            layer = network.layers[into]
            weights = folded_ahead(layer, EvalNorm.of(norm))
        except _KeptError as after:
            raise _both(before, after) from None
    try:
        set_weights(layer, *weights)
    except ValueError as error:
        raise _KeptError(str(error)) from None
    remove_norm(norm, behind, num_dimensions=layer.weight.dim(), what=f"{name} was folded into {into}")
    return into


def _both(before: _KeptError, after: _KeptError) -> _KeptError:
    """One reason of two: why not into the layer before, and why not into the one after."""
    if before.beside is None:
        return before
    if after.beside is None:
        return _KeptError(f"it comes after {before.beside}, and {after}")
    return _KeptError(
        f"it lies between {before.beside} and {after.beside}, with no convolution or linear layer next to it"
    )


def _neighbour(network: _Network, norm: _BatchNorm, calls: tuple[fx.Node, ...], *, is_before: bool) -> str:
    """The name of the layer next to this one in every call, if it can take it in. Raises _KeptError."""
    ends = [_end_of_walk(network, norm, call, is_before=is_before) for call in calls]
    into, *others = {layer_of(node) for node in ends}
    if others:
        raise _KeptError("it is called several times, next to different layers")
    assert into is not None
    kind = type(network.layers[into]).__name__
    try:
        all_calls = network.calls_of(into)
    except _KeptError as error:
        raise _KeptError(f"the {kind} {_side(is_before)}: {error}") from None
    if Counter(all_calls) != Counter(ends):
        raise _KeptError(f"the {kind} {_side(is_before)} is called elsewhere as well")
    return into


def _end_of_walk(network: _Network, norm: _BatchNorm, call: fx.Node, *, is_before: bool) -> fx.Node:
    """The call of the layer that can take this one in, past others that may be passed. Raises _KeptError."""
    passed: list[nn.Module] = []
    last, node = call, _step(call, is_before)
    while (name := layer_of(node)) is not None and is_passable(network.layers[name]):
        assert node is not None
        passed.append(network.layers[name])
        if is_before and users_of(node) != [last]:
            break
        last, node = node, _step(node, is_before)
    name = layer_of(node)
    layer = None if name is None else network.layers[name]
    if node is None or not isinstance(layer, _ConvNd | nn.Linear):
        raise _KeptError("", beside="several things" if node is None and not is_before else describe(node))
    is_shared = is_before and users_of(node) != [last]
    problems = [
        "feeds something else as well" if is_shared else None,
        problem_of_pair(layer, norm, is_before=is_before),
        *(problem_of_passing(one, layer, norm) for one in passed),
    ]
    problem = next((one for one in problems if one is not None), None)
    if problem is not None:
        raise _KeptError(f"the {type(layer).__name__} {_side(is_before)} {problem}")
    return node


def _step(node: fx.Node, is_before: bool) -> fx.Node | None:
    """What made the input of a call, or what takes its output, if that is one thing."""
    if is_before:
        return input_of(node)
    users = users_of(node)
    return users[0] if len(users) == 1 else None


def _side(is_before: bool) -> str:
    return "before it" if is_before else "after it"


def norms_behind(model: nn.Module) -> dict[str, str]:
    """By convolution or linear layer the BatchNorm layer that takes all of its output, as far as is seen.

    Poolings between the two that pass on what is the same everywhere do not count. `model` is left alone.

    Raises BncliError for a model that cannot be copied, or is not built yet.
    """
    network = _Network.copy_of(model)
    found = {}
    for name, norm in batch_norm_layers(network.model):
        try:
            found[_neighbour(network, norm, network.calls_of(name), is_before=True)] = name
        except _KeptError:
            continue
    return found
