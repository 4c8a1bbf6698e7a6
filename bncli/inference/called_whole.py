"""Whether a module's code does nothing with the modules below it but call them, read from its source.

Where torch.fx cannot follow the code of a module, that is all that need be known of it to follow the modules
below each by itself: no layer inside them is called in another way. In doubt the answer is no.
"""

import ast
import inspect
import textwrap
from types import FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

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
