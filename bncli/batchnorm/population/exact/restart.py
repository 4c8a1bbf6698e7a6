"""Forward passes that start in the middle, from what an earlier pass over the same images kept.

A pass over layer after layer computes everything before the layer again and again. Where all that follows
takes only a few outputs of modules (a `Cut`), those can be kept for each batch, and the next pass starts
there. It calls the model as always, since Python code cannot be entered in the middle; but up to the cut
all operations run on PyTorch's meta device, that is on shapes without numbers, in no time. The modules
concerned return what was kept. An operation behind the cut that takes anything without numbers is an error,
so what is computed is what would have been computed, or nothing at all.

Values are kept in memory and on disk (`kept.py`), by a digest of the batch they belong to: a batch that is
not known, because it is new, cut otherwise or found no room, is computed from its start. Once every batch
is known, later passes need no images at all: not read, not decoded, not compared. Before a cut is used it
is tried on two images; one that changes a bit of the model's output, or that the model has no shapes for,
is not used.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bncli.batchnorm.bits import as_bytes, bitwise_equal
from bncli.batchnorm.modes import eval_mode
from bncli.batchnorm.population.exact import kept
from bncli.batchnorm.population.exact.dataflow import Cut, DataFlow, Value
from bncli.batchnorm.population.exact.kept import KeptOutputs
from bncli.batchnorm.population.exact.schedule import Room, Schedule
from bncli.batchnorm.population.exact.spill import Layout
from bncli.batchnorm.population.exact.stages import Stage
from bncli.batchnorm.population.hooks import RestartError
from bncli.forward import model_device

_MAX_TRIALS = 4  # of schedules with cuts that turn out to be none


class LostError(Exception):
    """A batch cannot be gone on with from what was kept of it, and its images are not at hand."""


class Restarts:
    """What is kept of each batch, and forward passes that use it."""

    def __init__(
        self,
        model: nn.Module,
        flow: DataFlow,
        stages: Sequence[Stage],
        sample: Tensor,
        *,
        num_ranks: int = 1,
    ) -> None:
        # forward passes of a single image that were not computed, less those of trials
        self.saved = 0.0
        self._model = model
        self._modules = dict(model.named_modules())
        self._flow = flow
        self._stages = stages
        self._cuts = [cut for cut in flow.cuts if cut.cost > 0]
        self._sample = sample[:2].clone()  # a single one may have no batch statistics
        self._kept = KeptOutputs(model_device(model), num_ranks=num_ranks)
        self._schedule: Schedule | None = None
        self._num_images: int | None = None
        self._target: Cut | None = None
        self._until = inf  # the cost at which the pass ends
        self._works: set[Cut] = set()
        self._shapes: dict[object, list[_Step]] = {}  # by the shape of a batch
        self._order: list[tuple[bytes, Layout]] = []  # of the batches in the latest pass that read them
        self._place = 0  # of the batch that is replayed, in that order

    def close(self) -> None:
        """Forget everything and give the disk back."""
        self._kept.close()

    def aim(self, stage: int, num_images: int | None) -> None:
        """Choose what the pass of this stage keeps for later ones: what makes all of them cheapest.

        `num_images` is the number in a pass; while it is not known, nothing is written to disk.
        """
        self._kept.settle()
        if num_images != self._num_images:
            self._num_images, self._schedule = num_images, None
        start = self._target if len(self._kept) else None
        if self._schedule is None:
            self._schedule = self._working_schedule(stage, start)
        self._target = self._schedule.next_cut(stage, start)
        self._until = self._stages[stage].cost

    def _working_schedule(self, stage: int, start: Cut | None) -> Schedule:
        """One whose cuts have all been tried."""
        room = Room(kept.MAX_BYTES, 0 if self._num_images is None else self._kept.disk_bytes)
        for trial in count():
            if trial == _MAX_TRIALS:
                self._cuts = [cut for cut in self._cuts if cut in self._works]
            schedule = Schedule(
                self._flow, self._stages, self._cuts, first=stage, num_images=self._num_images or 1, room=room
            )
            unknown = [cut for cut in schedule.way(start) if cut not in self._works]
            works = self._try(unknown) if unknown else set()
            self._works |= works
            if len(works) == len(unknown):
                return schedule
            self._cuts = [cut for cut in self._cuts if cut in works or cut not in unknown]
        raise AssertionError

    @property
    def can_replay(self) -> bool:
        """Whether something is kept of every batch of the latest pass that read them."""
        return bool(self._order) and all(digest in self._kept for digest, _ in self._order)

    def reading(self) -> None:
        """Say that a pass begins that reads the images."""
        self._order.clear()

    def replay(self) -> Iterator[Tensor]:
        """The batches of the latest pass that read them, without numbers, for a pass that needs no images.

        Computing one raises LostError if it has to start from its images after all.
        """
        for place, (_, layout) in enumerate(self._order):
            self._place = place
            yield torch.empty_strided(layout.size, layout.stride, dtype=layout.dtype, device="meta")

    def forget(self) -> None:
        """Start from the images again."""
        self._kept.clear()
        self._schedule = None

    def forward(self, inputs: Tensor) -> None:
        """Compute the model's output from as far on as possible; keep the output of the cut aimed at.

        Raises RestartError for whatever goes wrong in the middle; from then on it starts at the beginning.
        """
        if inputs.is_meta:
            digest = self._order[self._place][0]
        else:
            if self._target is None and not len(self._kept):
                self._model(inputs)
                return
            digest = _digest(inputs)
            self._order.append((digest, Layout.of(inputs)))
        following = self._following() if inputs.is_meta else None
        found = self._kept.get(digest, self._until, following)
        if inputs.is_meta and found is None:
            raise LostError
        start = None if found is None else found[0]
        with self._keeping(None if start == self._target else self._target, digest):
            if found is None:
                self._model(inputs)
                return
            start, outputs = found
            self.saved += start.cost * len(inputs)
            try:
                self._start(inputs, start, outputs)
            except Exception as error:
                self.saved -= start.cost * len(inputs)
                self._cuts, self._schedule, self._target = [], None, None
                self._kept.clear()
                raise (LostError if inputs.is_meta else RestartError) from error

    def _start(self, inputs: Tensor, cut: Cut, outputs: Mapping[Value, Tensor]) -> object:
        """The model's output, computed from the cut on, as far as these of its values are enough."""
        device_type = (model_device(self._model) or torch.device("cpu")).type
        autocast = torch.is_autocast_enabled(device_type)
        mode = _NothingComputed(self._shapes.setdefault((inputs.shape, inputs.stride()), []))

        def hand_over(value: Value, _output: Any) -> Tensor | None:
            return outputs.get(value)

        def end(_output: Any) -> None:
            mode.ended = True
            torch.set_autocast_enabled(device_type, autocast)

        with self._at_values(cut, hand_over), _at_call(self._modules[cut.module], cut.number, end):
            try:
                # it would convert what lies on the device, and nothing on the meta device
                torch.set_autocast_enabled(device_type, False)
                with mode:
                    result = self._model(inputs.to("meta"))
            finally:
                torch.set_autocast_enabled(device_type, autocast)
        if not mode.ended:
            raise RestartError(f"{cut.module} was not called")
        return result

    def _following(self) -> bytes | None:
        """The batch that is replayed next, if any is."""
        following = self._place + 1
        return self._order[following][0] if following < len(self._order) else None

    @contextmanager
    def _keeping(self, cut: Cut | None, digest: bytes) -> Iterator[None]:
        if cut is None:
            yield
            return
        outputs: dict[Value, Tensor] = {}

        def note(value: Value, output: Any) -> None:
            if not output.is_meta:  # else this batch starts behind it
                outputs[value] = output

        def keep(_output: Any) -> None:
            self._kept.put(digest, cut, outputs, on_disk=self._num_images is not None)
            outputs.clear()

        with self._at_values(cut, note), _at_call(self._modules[cut.module], cut.number, keep):
            yield

    @contextmanager
    def _at_values(self, cut: Cut, do: Callable[[Value, Any], Tensor | None]) -> Iterator[None]:
        """Call `do` with each value of the cut; what it returns, if anything, takes the value's place."""
        with ExitStack() as hooks:
            for value in cut.values:
                hooks.enter_context(_at_call(self._modules[value.module], value.number, partial(do, value)))
            yield

    def _try(self, cuts: Sequence[Cut]) -> set[Cut]:
        """Those with which two images get the very output that they get without any."""
        outputs: dict[Value, Tensor] = {}
        found = set()

        def note(value: Value, output: Any) -> None:
            if value not in outputs:
                outputs[value] = output.clone()

        # Whatever a model cannot do on the meta device, it says in any kind of exception; without the cut it
        # is only slower.
        with eval_mode(self._model), torch.no_grad(), suppress(Exception):
            self.saved -= len(self._sample)
            inputs = self._sample.to(model_device(self._model))
            with ExitStack() as hooks:
                for cut in cuts:
                    hooks.enter_context(self._at_values(cut, note))
                expected = tree_leaves(self._model(inputs))
            for cut in cuts:
                self.saved -= len(self._sample) * (1 - cut.cost)
                with suppress(Exception):
                    values = {value: outputs[value].clone() for value in cut.values}
                    pairs = zip(expected, tree_leaves(self._start(inputs, cut, values)), strict=True)
                    if all(bitwise_equal(*pair) for pair in pairs if isinstance(pair[0], Tensor)):
                        found.add(cut)
        return found


@dataclass(frozen=True)
class _Step:
    """One operation on the meta device, which does nothing a second time but give what it gave."""

    func: Any
    output: Any
    is_first_argument: bool  # changed in place


class _NothingComputed(TorchDispatchMode):
    """Until it is ended, every operation runs on the meta device: shapes come out, numbers do not.

    From then on it refuses operations that take such a tensor. What came out is remembered in `steps`,
    since many of these operations are slow Python code.
    """

    def __init__(self, steps: list[_Step]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ended = False
        self._steps = steps
        self._index = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, on the meta device or as it is."""
        kwargs = kwargs or {}
        if self.ended:
            if any(isinstance(value, Tensor) and value.is_meta for value in tree_leaves((args, kwargs))):
                raise RestartError(f"{func} takes what was not computed")
            return func(*args, **kwargs)
        index = self._index
        self._index += 1
        if index < len(self._steps):
            step = self._steps[index]
            if step.func is not func:
                del self._steps[index:]
            elif not func.is_view:  # autograd wants each view to be a new object, and they cost little
                return args[0] if step.is_first_argument else step.output
        output, in_place = _on_meta(func, args, kwargs)
        if index == len(self._steps):
            self._steps.append(_Step(func, output, in_place))
        return output


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """What an operation puts out there, and whether that is its first argument, in the same shape."""
    if not any(isinstance(value, Tensor) for value in tree_leaves((args, kwargs))):
        return func(*args, **kwargs), False  # made of nothing: may be needed behind the cut
    args, kwargs = tree_map(_to_meta, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("meta")
    shape = args[0].shape if args and isinstance(args[0], Tensor) else None
    output = func(*args, **kwargs)
    return output, bool(args) and output is args[0] and output.shape == shape


@contextmanager
def _at_call(module: nn.Module, number: int, do: Callable[[Any], Tensor | None]) -> Iterator[None]:
    """Call `do` with what this call of the module returns; what it gives, if anything, takes its place."""
    calls = count()

    def after(_module: nn.Module, _args: object, output: Any) -> Tensor | None:
        return do(output) if next(calls) == number else None

    with module.register_forward_hook(after):
        yield


def _to_meta(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) else value


def _digest(inputs: Tensor) -> bytes:
    layout = f"{inputs.dtype} {tuple(inputs.shape)} {inputs.stride()}\n"
    digest = hashlib.blake2b(layout.encode())
    digest.update(as_bytes(inputs).cpu().numpy().data)
    return digest.digest()
