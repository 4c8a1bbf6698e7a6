"""A module called with a stand-in for its input, by torch.fx: the steps of its code, and what takes what.

Nothing is computed, and no example is needed. Optional arguments have their defaults, as in `model(inputs)`.
Where the code asks a yes-or-no question about numbers or shapes (`if x.mean() > 0`), every way through it is
followed. Code that asks for more, such as `range(x.shape[0])`, raises.
"""

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
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

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
