"""A module called with a stand-in for its input, by torch.fx: the steps of its code, and what takes what.

Nothing is computed, and no example is needed. Optional arguments have their defaults, as in `model(inputs)`.
Where the code asks a yes-or-no question about numbers or shapes (`if x.mean() > 0`), every way through it is
followed. Code that asks for more, such as `range(x.shape[0])`, raises.

Subclasses of BatchNorm, convolutions and linear layers with a `forward` of their own, read by torch.fx.

Many do only a little more than what they come from: timm's `BatchNormAct2d` adds an activation behind, its
`Conv2dSame` pads the input before. Others, such as convolutions that standardise their weights, do not.
"""

import copy
import dis
import inspect
import linecache
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm

_MAX_WAYS = 32  # through the code of one module
_MAX_QUESTIONS = 32  # on one way: a loop may have no end
# what asks for these takes no number of the tensor
_METADATA = {"shape", "ndim", "dtype", "device", "size", "dim", "numel", "is_floating_point"}
_POSITIONAL = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
_ONE_AT_A_TIME = threading.RLock()  # torch.fx changes nn.Module while it looks


class StandIn(fx.Proxy):
    """What goes through the code in place of a tensor, or of what is made of one."""

    tracer: "StandInTracer"

    def _kind(self) -> type:
        """What `isinstance` takes it for: to the code of a network it is a tensor, to torch.fx what it is."""
        asking = sys._getframe(1)
        if asking.f_globals.get("__name__", "").startswith("torch."):
            return type(self)
        # compiled code asks as well, and would take the answer at its word: only a call of isinstance counts
        line, _, column, _ = list(asking.f_code.co_positions())[asking.f_lasti // 2]
        text = "" if line is None else linecache.getline(asking.f_code.co_filename, line)
        if not text.encode()[column:].startswith(b"isinstance(") or _is_number(self.node):
            return type(self)
        if self.node.meta.get("is_unknown"):
            raise TraceError("it asks what kind of thing a module that cannot be followed gives")
        return Tensor

    __class__ = property(_kind)

    def __getattr__(self, name: str) -> Any:
        """Where a tensor lies is known, and code often asks. An input has what a tensor has."""
        if name == "device":
            return self.tracer.device
        if self.node.op == "placeholder" and not hasattr(Tensor, name):
            raise AttributeError(f"a tensor has no {name}")
        return super().__getattr__(name)


class StandInTracer(fx.Tracer):
    """One way through a module's own code. A module that it calls is one step, whatever is inside."""

    def __init__(self, answers: list[bool]) -> None:
        """`answers` are given to the first questions; True is given to others, and noted there."""
        super().__init__()
        self.graph = fx.Graph()
        self.depth = 0  # of calls that are being followed; only the first module has its questions answered
        self.device = torch.device("cpu")
        self._answers = answers
        self._num_asked = 0
        self._asked_at: tuple[object, int] | None = None  # the code that asked last, and calls so far
        self._thread = threading.get_ident()

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The module itself, and a stand-in for each argument that it must be given."""
        _, *parameters = inspect.signature(root_fn).parameters.values()
        names = [one.name for one in parameters if one.kind in _POSITIONAL and one.default is one.empty]
        names = names or [one.name for one in parameters][:1]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for the value made there."""
        return StandIn(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Any call of a module while this looks."""
        if threading.get_ident() != self._thread:  # a network that somebody else is using
            return forward(*args, **kwargs)
        return self.follow_call(m, args, kwargs)

    def follow_call(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a module that is called gives."""
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The answer to a question."""
        if self.depth or self._num_asked == _MAX_QUESTIONS:
            return super().to_bool(obj)
        if self._num_asked == len(self._answers):
            self._answers.append(True)
        self._num_asked += 1
        self._asked_at = (sys._getframe(2).f_code, self._num_calls())
        return self._answers[self._num_asked - 1]

    def was_refused(self, error: Exception) -> bool:
        """Whether code raised this itself, right after an answer: a check of shapes, or `assert`."""
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        if last is None or self._asked_at != (last.tb_frame.f_code, self._num_calls()):
            return False
        return last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]

    def _num_calls(self) -> int:
        return sum(node.op == "call_module" for node in self.graph.nodes)


def follow_every_way(
    module: nn.Module, tracer_of: Callable[[list[bool]], StandInTracer], see: Callable[[fx.Graph], None]
) -> None:
    """Show the steps of every way through a module's own code, of each broken one too.

    Raises what the code raises, or TraceError. An error right after an answer (`StandInTracer.was_refused`)
    ends a way that leads nowhere, and counts only if all ways end so.
    """
    is_called_so = type(module).__call__ is nn.Module.__call__ or isinstance(module, fx.GraphModule)
    if "forward" in vars(module) or not is_called_so:  # torch.fx knows the forward of the class alone
        raise TypeError("it is called in a way of its own")
    answers: list[bool] = []
    is_through = False
    refusal: Exception | None = None
    for _ in range(_MAX_WAYS):
        tracer = tracer_of(answers)
        try:
            with _undisturbed():
                tracer.trace(module)
            is_through = True
        except Exception as error:
            if not tracer.was_refused(error):
                raise
            refusal = error
        finally:
            see(tracer.graph)
        while answers and not answers[-1]:
            answers.pop()
        if not answers:
            break
        answers[-1] = False
    else:
        raise TraceError(f"more than {_MAX_WAYS} ways lead through it")
    if refusal is not None and not is_through:
        raise refusal


@contextmanager
def _undisturbed() -> Iterator[None]:
    # warnings would be about numbers that are not there
    with _ONE_AT_A_TIME, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def input_of(node: fx.Node) -> fx.Node | None:
    """What a module is called with; None where that is not made from the input."""
    value = node.args[0] if node.args else node.kwargs.get("input")
    return value if isinstance(value, fx.Node) else None


def users_of(node: fx.Node) -> list[fx.Node]:
    """What takes the numbers of an output; to ask for its shape does not count."""
    return [user for user in node.users if not _asks_for_metadata(user)]


def _asks_for_metadata(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _METADATA
    return node.op == "call_method" and node.target in _METADATA


def _is_number(node: fx.Node) -> bool:
    """Whether a value is made from sizes alone."""
    waiting, seen = [node], {node}
    while waiting:
        one = waiting.pop()
        if _asks_for_metadata(one):
            continue
        if one.op != "call_function" or not one.all_input_nodes:
            return False
        waiting += set(one.all_input_nodes) - seen
        seen.update(waiting)
    return True


def has_hooks(module: nn.Module) -> bool:
    """Whether something watches or changes what goes in or comes out."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any((*hooks, module._backward_hooks, module._backward_pre_hooks))


def what_a_hook_does(value: Any) -> Any:
    """Stands among the steps for a hook, which is not run."""
    return value


def describe(node: fx.Node | None) -> str:
    """A few words for what makes or takes a tensor: cat, ReLU, the input."""
    if node is None:
        return "a constant"
    if node.op in {"placeholder", "output"}:
        return "the input" if node.op == "placeholder" else "the output"
    if node.target is what_a_hook_does:
        return "a module with a hook"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "an operation")


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
