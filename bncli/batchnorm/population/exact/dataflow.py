"""Which BatchNorm layer's input depends on which others, read from what a model really computes.

One batch is computed while every tensor operation is watched below autograd. A tensor's sources are the
BatchNorm layers whose outputs it was made from; an operation hands the sources of all its inputs to all its
outputs. Where in doubt the answer is "depends", which costs a pass and is never wrong: all views of one
storage share their sources, and once a value leaves the tensors (`.item()`, a comparison in an `if`)
everything after it depends on it. What is not seen: data that leave through `.numpy()` or `.tolist()`.

The same look finds cuts: ends of a module's call after which nothing of what was computed before is taken
but that call's output. Whoever has kept that output can start there (`restart.py`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bncli.batchnorm.modes import eval_mode
from bncli.batchnorm.population.hooks import input_of_call, unbuilt_layers_refused
from bncli.forward import model_device

NO_SOURCES: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Call:
    """One call of a BatchNorm layer within a forward pass."""

    layer: str
    sources: frozenset[str]  # the layers that its input was made from
    cost: float  # of everything computed before it, as a fraction of the whole forward pass


@dataclass(frozen=True)
class Cut:
    """A call of a module that divides a forward pass: what follows takes only its output, a tensor."""

    module: str
    number: int  # of this call among the module's, from 0
    num_layer_calls: int  # calls of BatchNorm layers before the end of this one
    cost: float  # of everything computed up to its end, as a fraction of the whole forward pass
    bytes_per_image: float  # of its output


@dataclass(frozen=True)
class DataFlow:
    """One forward pass, both in order of execution."""

    calls: tuple[Call, ...]
    cuts: tuple[Cut, ...]
    cost_per_image: float  # of the whole forward pass, counted as `trace_flow` says


def trace_flow(model: nn.Module, inputs: Tensor, layers: Mapping[str, _BatchNorm]) -> DataFlow:
    """Every call of these layers, and every cut, in one forward pass in eval mode.

    The cost is counted: the FLOPs of matrix products and convolutions, and 1 for each number that any
    other operation puts out.
    """
    flow = _Flow()
    made: list[tuple[str, frozenset[str], float]] = []
    ends: list[_CallEnd] = []
    with eval_mode(model), unbuilt_layers_refused(model), torch.no_grad():
        inputs = inputs.to(model_device(model))
        flow.begin(inputs)
        with _following(layers, flow, made), _call_ends(model, flow, made, ends), flow:
            model(inputs)
    whole = max(flow.cost, 1.0)
    calls = tuple(Call(name, sources, cost / whole) for name, sources, cost in made)
    spans, num_live = flow.all_spans(), flow.num_live()
    cuts = []
    for end in ends:
        alone = num_live[end.time] == 1 and any(
            span.storage == end.storage and span.crosses(end.time) for span in spans
        )
        if alone and end.time < flow.left_at:
            size = end.num_bytes / len(inputs)
            cuts.append(Cut(end.module, end.number, end.num_layer_calls, end.cost / whole, size))
    return DataFlow(calls, tuple(cuts), whole / len(inputs))


@dataclass(frozen=True)
class _CallEnd:
    """The end of a module's call that returned one tensor."""

    module: str
    number: int
    num_layer_calls: int
    cost: float
    time: int  # operations so far
    storage: int
    num_bytes: int


@contextmanager
def _call_ends(
    model: nn.Module, flow: "_Flow", made: Sequence[object], ends: list[_CallEnd]
) -> Iterator[None]:
    num_calls: Counter[str] = Counter()
    handles = []

    def note(name: str) -> Callable[..., None]:
        def after(_module: nn.Module, _args: object, output: object) -> None:
            number = num_calls[name]
            num_calls[name] += 1
            if type(output) is not Tensor:
                return
            storage = _storage(output)
            if storage is not None:
                num_bytes = output.numel() * output.element_size()
                ends.append(_CallEnd(name, number, len(made), flow.cost, flow.time, storage, num_bytes))

        return after

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(note(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


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


@dataclass
class _Span:
    """From the operation that made a storage to the last one that took it; a span of constants is none."""

    storage: int
    first: int
    last: int

    def crosses(self, time: int) -> bool:
        """Whether something after that many operations takes what was there before."""
        return self.first <= time < self.last


class _Flow(TorchDispatchMode):
    """Sources and lifetime of every storage, and the cost so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = 0.0
        self.time = 0  # operations so far
        self.left_at = inf  # when a value first left the tensors
        self._by_storage: dict[int, frozenset[str]] = {}
        self._everywhere = NO_SOURCES  # what left the tensors and may have decided anything since
        self._spans: dict[int, _Span] = {}
        self._ended: list[_Span] = []

    def begin(self, inputs: Tensor) -> None:
        """Say what goes into the model, which no operation makes."""
        self._begin_span(inputs)

    def all_spans(self) -> list[_Span]:
        """Of every storage that was made or written to."""
        return [*self._ended, *self._spans.values()]

    def num_live(self) -> list[int]:
        """After every operation, from none: how many storages cross to what follows."""
        changes = [0] * (self.time + 2)
        for span in self.all_spans():
            changes[span.first] += 1
            changes[span.last] -= 1
        return list(accumulate(changes))

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
        self.time += 1
        self._extend_spans(before)
        for value in outputs:
            if not isinstance(value, Tensor):
                if value is not None:
                    self._everywhere |= sources
                    self.left_at = min(self.left_at, self.time)
            elif _storage(value) not in before or _storage(value) is None:
                self._put(value, sources)  # a new storage, perhaps where an older one was
                self._begin_span(value)
        if func._schema.is_mutable:
            for value in inputs:
                self._put(value, sources)
                if _storage(value) not in self._spans:  # a constant that is none
                    self._begin_span(value)
        self.cost += self._cost_of(func, args, kwargs, output)
        return output

    def _begin_span(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if storage is None:  # a layout without one: it may be needed at any time
            self.left_at = min(self.left_at, self.time)
            return
        if storage in self._spans:
            self._ended.append(self._spans[storage])
        self._spans[storage] = _Span(storage, self.time, self.time)

    def _extend_spans(self, storages: Iterable[int | None]) -> None:
        for storage in storages:
            if storage in self._spans:
                self._spans[storage].last = self.time

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
