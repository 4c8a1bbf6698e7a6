"""Which BatchNorm layer's input depends on which others, read from what a model really computes.

One batch is computed while every tensor operation is watched below autograd. A tensor's sources are the
BatchNorm layers whose outputs it was made from; an operation hands the sources of all its inputs to all its
outputs. Where in doubt the answer is "depends", which costs a pass and is never wrong: all views of one
storage share their sources, and once a value leaves the tensors (`.item()`, a comparison in an `if`)
everything after it depends on it. What is not seen: data that leave through `.numpy()` or `.tolist()`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bncli.stats.modes import eval_mode
from bncli.stats.passes import model_device
from bncli.stats.recording import input_of_call, unbuilt_layers_refused

NO_SOURCES: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Call:
    """One call of a BatchNorm layer within a forward pass."""

    layer: str
    sources: frozenset[str]  # the layers that its input was made from
    cost: float  # of everything computed before it, as a fraction of the whole forward pass


def trace_calls(model: nn.Module, inputs: Tensor, layers: Mapping[str, _BatchNorm]) -> tuple[Call, ...]:
    """Every call of these layers in one forward pass in eval mode, in order of execution.

    The cost is counted: the FLOPs of matrix products and convolutions, and 1 for each number that any
    other operation puts out.
    """
    flow = _Flow()
    made: list[tuple[str, frozenset[str], float]] = []
    with eval_mode(model), unbuilt_layers_refused(model), torch.no_grad(), _following(layers, flow, made):
        inputs = inputs.to(model_device(model))
        with flow:
            model(inputs)
    return tuple(Call(name, sources, cost / max(flow.cost, 1.0)) for name, sources, cost in made)


@contextmanager
def _following(
    layers: Mapping[str, _BatchNorm], flow: "_Flow", made: list[tuple[str, frozenset[str], float]]
) -> Iterator[None]:
    handles = []

    def follow(name: str, layer: _BatchNorm) -> None:
        def before(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            made.append((name, flow.sources_of([input_of_call(args, kwargs)]), flow.cost))

        def after(_layer: nn.Module, _args: object, output: object) -> None:
            flow.add_source(output, name)

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))

    try:
        for name, layer in layers.items():
            follow(name, layer)
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Flow(TorchDispatchMode):
    """Sources of every storage, and the cost so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = 0.0
        self._by_storage: dict[int, frozenset[str]] = {}
        self._everywhere = NO_SOURCES  # what left the tensors and may have decided anything since

    def sources_of(self, values: object) -> frozenset[str]:
        """The layers that any tensor in there was made from."""
        storages = [_storage(value) for value in tree_leaves(values) if isinstance(value, Tensor)]
        known = [self._by_storage.get(one, NO_SOURCES) for one in storages if one is not None]
        return self._everywhere.union(*known)

    def add_source(self, values: object, name: str) -> None:
        """Note that all tensors in there were made from this layer."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self._put(value, self.sources_of([value]) | {name})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute one operation, and hand on the sources of its inputs."""
        kwargs = kwargs or {}
        sources = self.sources_of((args, kwargs))
        output = func(*args, **kwargs)
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        outputs = tree_leaves(output)
        before = {_storage(value) for value in inputs}
        for value in outputs:
            if not isinstance(value, Tensor):
                self._everywhere |= sources if value is not None else NO_SOURCES
            elif _storage(value) not in before or _storage(value) is None:
                self._put(value, sources)  # a new storage, perhaps where an older one was
        if func._schema.is_mutable:
            for value in inputs:
                self._put(value, sources)
        self.cost += self._cost_of(func, args, kwargs, output)
        return output

    def _put(self, tensor: Tensor, sources: frozenset[str]) -> None:
        storage = _storage(tensor)
        if storage is None:  # a layout without one: from here on everything may depend on it
            self._everywhere |= sources
        else:
            self._by_storage[storage] = sources

    @staticmethod
    def _cost_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> float:
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            return float(count(*args, **kwargs, out_val=output))
        if func.is_view:
            return 0.0
        return float(sum(value.numel() for value in tree_leaves(output) if isinstance(value, Tensor)))


def _storage(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None
