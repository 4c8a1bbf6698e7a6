"""Subclasses of BatchNorm, convolutions and linear layers with a `forward` of their own, read by torch.fx.

Many do only a little more than what they come from: timm's `BatchNormAct2d` adds an activation behind, its
`Conv2dSame` pads the input before. Others, such as convolutions that standardise their weights, do not.
"""

import copy
import inspect

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bncli.inference.stand_in import StandInTracer, follow_every_way, input_of, users_of

_FUNCTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d, nn.Linear: F.linear}


def modules_behind(norm: _BatchNorm) -> dict[str, nn.Module] | None:
    """What a BatchNorm layer calls in eval mode on what it normalised, one after the other.

    None where it does anything else than to normalise by its own running statistics and to call these.
    """
    ways = _ways_through(norm)
    found = [_names_behind(graph, norm) for graph in ways]
    if not found or found[0] is None or any(names != found[0] for names in found):
        return None
    return {name: norm.get_submodule(name) for name in found[0]}


def ends_in_product(layer: nn.Module) -> bool:
    """Whether what a convolution or linear layer gives is PyTorch's own product with its weight, plus bias.

    Then whatever multiplies its output can multiply its weight and bias instead.
    """
    functions = [function for kind, function in _FUNCTIONS.items() if isinstance(layer, kind)]
    ways = _ways_through(layer) if functions else []
    return bool(ways) and all(_is_product(graph, functions[0]) for graph in ways)


def _ways_through(module: nn.Module) -> list[fx.Graph]:
    """The steps of every way through; none where they cannot be followed."""
    graphs: list[fx.Graph] = []
    try:
        follow_every_way(copy.deepcopy(module), StandInTracer, graphs.append)
    except Exception:  # whatever its code may raise
        return []
    return [graph for graph in graphs if any(node.op == "output" for node in graph.nodes)]


def _names_behind(graph: fx.Graph, norm: _BatchNorm) -> list[str] | None:
    nodes: list[fx.Node] = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    calls = [node for node in nodes if node.target is F.batch_norm]
    if len(inputs) != 1 or len(calls) != 1 or input_of(calls[0]) is not inputs[0]:
        return None
    if users_of(inputs[0]) != calls or not _is_eval_mode(calls[0], norm):
        return None
    names: list[str] = []
    node: fx.Node = calls[0]
    while True:
        users = users_of(node)
        if len(users) != 1 or users[0].args != (node,) or users[0].kwargs:
            return None
        if users[0].op == "output":
            return names
        name = str(users[0].target)
        if users[0].op != "call_module" or "." in name or name in names:
            return None
        names.append(name)
        node = users[0]


def _is_eval_mode(call: fx.Node, norm: _BatchNorm) -> bool:
    """Whether `F.batch_norm` is given the layer's own statistics, weight and bias, for eval mode."""
    given = inspect.signature(F.batch_norm).bind(*call.args, **call.kwargs)
    given.apply_defaults()
    arguments = given.arguments
    if arguments["training"] is not False or arguments["eps"] != norm.eps:
        return False
    for name in ("running_mean", "running_var", "weight", "bias"):
        value = arguments[name]
        if not _is_own(value, name) and not (value is None and getattr(norm, name) is None):
            return False
    return True


def _is_product(graph: fx.Graph, function: object) -> bool:
    (output,) = (node for node in graph.nodes if node.op == "output")
    call = output.args[0]
    if not isinstance(call, fx.Node) or call.target is not function:
        return False
    arguments = dict(zip(("input", "weight", "bias"), call.args, strict=False)) | call.kwargs
    weight, bias = arguments.get("weight"), arguments.get("bias")
    if not _is_own(weight, "weight") or not (bias is None or _is_own(bias, "bias")):
        return False
    # neither is used for anything else, nor added by other means
    read = [node for node in graph.nodes if node.op == "get_attr" and node.target in {"weight", "bias"}]
    return all(users_of(node) == [call] and node in {weight, bias} for node in read if users_of(node))


def _is_own(value: object, name: str) -> bool:
    return isinstance(value, fx.Node) and (value.op, value.target) == ("get_attr", name)
