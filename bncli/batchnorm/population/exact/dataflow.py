"""Which BatchNorm layer's input depends on which others, read from what a model really computes.

One batch is computed while every tensor operation is watched below autograd. A tensor's sources are the
BatchNorm layers whose outputs it was made from; an operation hands the sources of all its inputs to all its
outputs. Where in doubt the answer is "depends", which costs a pass and is never wrong: all views of one
storage share their sources, and once a value leaves the tensors (`.item()`, a comparison in an `if`)
everything after it depends on it. What is not seen: data that leave through `.numpy()` or `.tolist()`.

The same look finds cuts: moments at which all that is still going to be taken are outputs of modules' calls:
in a residual block, what went into the block and the latest convolution's output. Whoever has kept those can
start there (`restart.py`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
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
class Value:
    """What a module's call returned, one tensor, as it was then."""

    module: str
    number: int  # of this call among the module's, from 0
    bytes_per_image: float


@dataclass(frozen=True)
class Cut:
    """The end of a module's call that divides a forward pass: what follows takes only these values."""

    module: str
    number: int  # of this call among the module's, from 0
    values: tuple[Value, ...]  # in order of execution
    next_uses: tuple[float, ...]  # the cost of everything computed before each is taken next
    num_layer_calls: int  # calls of BatchNorm layers before the end of this one
    cost: float  # of everything computed up to its end, as a fraction of the whole forward pass

    @property
    def bytes_per_image(self) -> float:
        """Of all values."""
        return sum(value.bytes_per_image for value in self.values)

    def needed(self, until: float) -> tuple[Value, ...]:
        """The values that are taken before so much is computed."""
        uses = zip(self.values, self.next_uses, strict=True)
        return tuple(value for value, next_use in uses if next_use <= until)


@dataclass(frozen=True)
class DataFlow:
    """One forward pass, both in order of execution."""

    calls: tuple[Call, ...]
    cuts: tuple[Cut, ...]
    cost_per_image: float  # of the whole forward pass, counted as `trace_flow` says
    input_bytes_per_image: float


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
    cuts = tuple(_cuts(flow, ends, whole, len(inputs)))
    return DataFlow(calls, cuts, whole / len(inputs), inputs.nbytes / len(inputs))


def _cuts(flow: "_Flow", ends: Sequence["_CallEnd"], whole: float, num_images: int) -> Iterator[Cut]:
    spans = flow.all_spans()
    by_storage: dict[int, list[_CallEnd]] = {}
    for end, following in zip_longest(ends, ends[1:]):
        if end.time >= flow.left_at:
            return
        if end.storage is not None:
            by_storage.setdefault(end.storage, []).append(end)
        if following is not None and following.time == end.time:
            continue  # the same moment
        live = [span for span in spans if span.crosses(end.time)]
        made = [span.made_by(by_storage.get(span.storage, ()), end.time) for span in live]
        found = [(one, span) for one, span in zip(made, live, strict=True) if one is not None]
        if len(found) < len(live) or not live:
            continue
        found.sort(key=lambda pair: pair[0].time)
        yield Cut(
            end.module,
            end.number,
            tuple(Value(one.module, one.number, one.num_bytes / num_images) for one, _ in found),
            tuple(span.next_use(end.time) / whole for _, span in found),
            end.num_layer_calls,
            end.cost / whole,
        )


@dataclass(frozen=True)
class _CallEnd:
    """The end of a module's call."""

    module: str
    number: int
    num_layer_calls: int
    cost: float
    time: int  # operations so far
    storage: int | None  # of what it returned, if that was one tensor
    num_bytes: int


@contextmanager
def _call_ends(
    model: nn.Module, flow: "_Flow", made: Sequence[object], ends: list[_CallEnd]
) -> Iterator[None]:
    num_calls: Counter[str] = Counter()
    handles = []

    def note(name: str) -> Callable[..., None]:
        def after(_module: nn.Module, _args: object, output: Any) -> None:
            number = num_calls[name]
            num_calls[name] += 1
            is_tensor = type(output) is Tensor
            storage = _storage(output) if is_tensor else None
            num_bytes = output.numel() * output.element_size() if is_tensor else 0
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
    writes: list[int] = field(default_factory=list)  # the operations that wrote to it later on
    uses: list[tuple[int, float]] = field(default_factory=list)  # what took it, and the cost before that

    def crosses(self, time: int) -> bool:
        """Whether something after that many operations takes what was there before."""
        return self.first <= time < self.last

    def made_by(self, ends: Sequence[_CallEnd], time: int) -> _CallEnd | None:
        """The first of these calls that returned what was there at that time."""
        since = max([self.first, *(one for one in self.writes if one <= time)])
        return next((end for end in ends if end.time >= since), None)

    def next_use(self, time: int) -> float:
        """The cost of everything before it is taken after that time."""
        return next(cost for one, cost in self.uses if one > time)


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
            for value in _written(func, args, kwargs):
                storage = _storage(value)
                if storage in self._spans:
                    self._spans[storage].writes.append(self.time)
                else:  # a constant that is none
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
                self._spans[storage].uses.append((self.time, self.cost))

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


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
    aliases = {one.name: one.alias_info for one in func._schema.arguments}
    written = [value for name, value in given.items() if aliases[name] and aliases[name].is_write]
    return [value for value in tree_leaves(written) if isinstance(value, Tensor)]


def _storage(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None
