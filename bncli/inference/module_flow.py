"""Which layer's output goes into which other one, read from a network's own code by torch.fx.

A copy of the network is called in eval mode with a stand-in for its input (`stand_in`), down to its layers. A
module whose code asks the stand-in a question is followed by itself, every way through it.

Where code asks for what no stand-in has (`range(x.shape[0])`), nothing is known of the layers that this
module calls itself. Those in the modules below it are known if its code only calls these modules, each as a
whole. That is read from its source, and in doubt the answer is no.
"""

import ast
import copy
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from types import FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from bncli.inference.stand_in import StandInTracer, follow_every_way, has_hooks, what_a_hook_does

# what a plain attribute may be: none of these holds a module
_PLAIN = (bool, int, float, complex, str, NoneType, Tensor, torch.dtype, torch.device)


def calls_parts_whole(module: nn.Module) -> bool:
    """See above: for `forward`, and the methods of the class that it uses."""
    waiting: list[Any] = [getattr(type(module), "forward", None)]  # torch.jit's classes have none
    read: set[object] = set()
    while waiting:
        function = inspect.unwrap(waiting.pop())
        if function in read:
            continue
        read.add(function)
        code = _code_of(function)
        if code is None:
            return False
        parents = {child: node for node in ast.walk(code) for child in ast.iter_child_nodes(node)}
        for use in (node for node in ast.walk(code) if isinstance(node, ast.Name)):
            if use.id not in {code.args.args[0].arg, "super"}:
                continue
            attribute = parents[use]
            if not isinstance(attribute, ast.Attribute) or not _is_harmless(module, attribute, parents):
                return False
            method = getattr(type(module), attribute.attr, None)
            method = method.fget if isinstance(method, property) else method
            if isinstance(method, FunctionType):
                waiting.append(method)
    return True


def _code_of(function: Any) -> ast.FunctionDef | None:
    """Of a method that names itself; None where there is no source, or none of a function alone."""
    try:
        (code,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return code if isinstance(code, ast.FunctionDef) and code.args.args else None


def _is_harmless(module: nn.Module, attribute: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether this use of `self.name` does not reach into a module below."""
    name, use = attribute.attr, parents[attribute]
    if name in module._modules:
        if isinstance(use, ast.For) and use.iter is attribute:  # over nn.ModuleList, which cannot be called
            is_list = getattr(type(module._modules[name]), "forward", None) is nn.Module.forward
            return is_list and _only_calls(use, parents)
        is_test = isinstance(use, ast.Compare) and all(isinstance(one, ast.Is | ast.IsNot) for one in use.ops)
        return is_test or (isinstance(use, ast.Call) and use.func is attribute)
    if name in module._parameters or name in module._buffers:
        return True
    if hasattr(type(module), name):  # methods are read in their turn
        return True
    value = vars(module).get(name)
    values = value if isinstance(value, tuple | list) else [value]
    return all(isinstance(one, _PLAIN) for one in values)


def _only_calls(loop: ast.For, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether what a loop goes through is called, and nothing else is done with it, there or later."""
    if not isinstance(loop.target, ast.Name):
        return False
    uses = [node for node in parents if isinstance(node, ast.Name) and node.id == loop.target.id]
    users = [(use, parents[use]) for use in uses]
    return all(
        (isinstance(user, ast.For) and user.target is use)
        or (isinstance(user, ast.Call) and user.func is use)
        for use, user in users
    )


@dataclass(frozen=True)
class ModuleFlow:
    """The calls of layers: of BatchNorm, convolutions, `nn.Linear` and what else torch.nn has, by name."""

    calls: Mapping[str, Sequence[fx.Node]]
    out_of_sight: Mapping[str, str]  # layers that may be called where nothing is seen, and why
    read_directly: frozenset[str]  # layers whose weights or statistics other code reads


def follow_modules(model: nn.Module) -> ModuleFlow:
    """Say what is called with what. The model is left as it was."""
    twin = copy.deepcopy(model).eval()
    seen = _Seen(twin)
    if seen.is_layer(twin):
        return ModuleFlow({}, {"": "it is the whole network"}, frozenset())
    while seen.waiting:
        module = seen.waiting.pop()
        try:
            follow_every_way(module, partial(_Tracer, seen), seen.note)
        except Exception as error:  # whatever the code of a network may raise
            seen.lose(module, error)
    return seen.flow()


def layer_of(node: fx.Node | None) -> str | None:
    """The name of the layer that is called there; None where it is none of the network's."""
    return None if node is None else node.meta.get("layer")


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())


class _Seen:
    """What several traces of one network have found so far."""

    def __init__(self, twin: nn.Module) -> None:
        self.waiting = [twin]
        self.read: set[int] = set()  # by identity: tensors that code reads itself
        first = next(chain(twin.parameters(), twin.buffers()), None)
        self.device = torch.device("cpu") if first is None else first.device
        self._modules = dict(twin.named_modules())
        self._names = {id(module): name for name, module in self._modules.items()}
        self._calls: dict[str, list[fx.Node]] = defaultdict(list)
        self._out_of_sight: dict[str, str] = {}
        self._apart: dict[int, nn.Module] = {}  # by identity: followed each by itself

    def name_of(self, module: nn.Module) -> str | None:
        """The name of a module; None for one that is not the network's."""
        return self._names.get(id(module))

    def is_layer(self, module: nn.Module) -> bool:
        """Whether a call of it is one step, into whose code nobody looks."""
        if isinstance(module, _BatchNorm | _ConvNd | nn.Linear):
            return True
        is_torchs = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))
        return is_torchs and not isinstance(module, nn.Sequential) and not _has_batch_norm(module)

    def is_apart(self, module: nn.Module) -> bool:
        """Whether it is followed by itself, and one step for whoever calls it."""
        return id(module) in self._apart

    def put_apart(self, module: nn.Module) -> None:
        """Follow a module by itself, later."""
        if not self.is_apart(module):
            self._apart[id(module)] = module
            self.waiting.append(module)

    def note(self, graph: fx.Graph) -> None:
        """Take in what one trace saw; one that broke off has seen calls all the same."""
        for node in graph.nodes:
            name = layer_of(node)
            if name is not None:
                self._calls[name].append(node)
                layer = self._modules[name]
                for part in layer.modules():
                    if part is not layer:
                        self._hide(part, f"{type(layer).__name__} calls it out of sight")

    def lose(self, module: nn.Module, error: Exception) -> None:
        """Give up on the code of one module, and follow each one below it by itself if that is right."""
        message = " ".join(str(error).split())
        short = message if len(message) < 90 else f"{message[:87]}..."
        why = f"{type(module).__name__}.forward ({type(error).__name__}: {short})"
        is_whole = calls_parts_whole(module)
        for part in _parts(module):
            if self.is_layer(part):
                self._hide(part, f"torch.fx cannot follow {why}")
            elif is_whole:
                self.put_apart(part)
            else:
                for inside in part.modules():
                    self._hide(
                        inside, f"torch.fx cannot follow {why}, which does more than to call its parts"
                    )

    def flow(self) -> ModuleFlow:
        """All of it."""
        read = {
            name
            for name, module in self._modules.items()
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
            if id(tensor) in self.read
        }
        return ModuleFlow(dict(self._calls), self._out_of_sight, frozenset(read))

    def _hide(self, module: nn.Module, why: str) -> None:
        name = self.name_of(module)
        if name is not None:
            self._out_of_sight[name] = why


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that code of this one may call; what is in lists of modules counts as its own."""
    for child in module.children():
        if getattr(type(child), "forward", None) is nn.Module.forward:  # nn.ModuleList cannot be called
            yield from _parts(child)
        else:
            yield child


class _Tracer(StandInTracer):
    """Follows a network down to its layers. Hooks are not run: what passes one may be changed by it."""

    def __init__(self, seen: _Seen, answers: list[bool]) -> None:
        super().__init__(answers)
        self.seen = seen
        self.device = seen.device

    def follow_call(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One step for a layer, else what is inside."""
        if self.seen.is_layer(m) or self.seen.is_apart(m):
            return self._one_step(m, args, kwargs)
        num_nodes = len(self.graph.nodes)
        hooked = has_hooks(m)
        self.depth += 1
        try:
            inputs = self._past_a_hook((args, kwargs)) if hooked else (args, kwargs)
            output = m.forward(*inputs[0], **inputs[1])
        except Exception:  # whatever the code of a network may raise
            # what it has called until then is seen when it is followed by itself
            for node in islice(self.graph.nodes, num_nodes, None):
                node.meta.pop("layer", None)
            self.seen.put_apart(m)
            return self._one_step(m, args, kwargs)
        finally:
            self.depth -= 1
        return self._past_a_hook(output) if hooked else output

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """An attribute of a module, which layers do not ask for, since nobody looks into them."""
        if isinstance(attr_val, Tensor):
            self.seen.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """An argument of an operation."""
        if issubclass(type(a), Tensor):  # no stand-in for one
            self.seen.read.add(id(a))
        return super().create_arg(a)

    def _one_step(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy:
        call = self.create_proxy("call_module", type(m).__name__, args, kwargs)
        is_layer = self.seen.is_layer(m)
        if is_layer:
            call.node.meta["layer"] = self.seen.name_of(m)
        is_simple = is_layer and not isinstance(m, nn.RNNBase | nn.RNNCellBase) and not list(m.children())
        call.node.meta["is_unknown"] = not is_simple  # whether a tensor comes out, or a tuple, say
        return call

    def _past_a_hook(self, values: Any) -> Any:
        def passed(value: fx.Proxy) -> fx.Proxy:
            return self.create_proxy("call_function", what_a_hook_does, (value,), {})

        return tree_map_only(fx.Proxy, passed, values)
