"""Forward passes that start in the middle, from what an earlier pass over the same images kept.

A pass over layer after layer computes everything before the layer again and again. Where all that follows
a module's call takes only its output (a `Cut`), that output can be kept for each batch, and the next pass
starts there. It calls the model as always, since Python code cannot be entered in the middle; but up to
the cut all operations run on PyTorch's meta device, that is on shapes without numbers, in no time. At the
cut the kept output takes over. An operation behind it that takes anything without numbers is an error, so
what is computed is what would have been computed, or nothing at all.

Outputs are kept in memory and on disk (`kept.py`), by a digest of the batch they belong to: a batch that is
not known, because it is new, cut otherwise or found no room, is computed from its start. Once every batch
is known, later passes need no images at all: not read, not decoded, not compared. Before a cut is used it
is tried on two images; one that changes a bit of the model's output, or that the model has no shapes for,
is not used.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bncli.batchnorm.bits import as_bytes, bitwise_equal
from bncli.batchnorm.modes import eval_mode
from bncli.batchnorm.population.exact import kept
from bncli.batchnorm.population.exact.dataflow import Cut, DataFlow
from bncli.batchnorm.population.exact.kept import KeptOutputs
from bncli.batchnorm.population.exact.schedule import Room, Schedule
from bncli.batchnorm.population.exact.spill import Layout
from bncli.batchnorm.population.exact.stages import Stage
from bncli.batchnorm.population.hooks import RestartError
from bncli.forward import model_device

_MAX_TRIALS = 4  # of cuts that turn out to be none, in a row


class LostError(Exception):
    """A batch cannot be gone on with from what was kept of it, and its images are not at hand."""


class Restarts:
    """What is kept of each batch, and forward passes that use it."""

    def __init__(self, model: nn.Module, flow: DataFlow, stages: Sequence[Stage], sample: Tensor) -> None:
        # forward passes of a single image that were not computed, less those of trials
        self.saved = 0.0
        self._model = model
        self._modules = dict(model.named_modules())
        self._flow = flow
        self._stages = stages
        self._cuts = [cut for cut in flow.cuts if cut.cost > 0]
        self._sample = sample[:2].clone()  # a single one may have no batch statistics
        self._kept = KeptOutputs(model_device(model))
        self._schedule: Schedule | None = None
        self._num_images: int | None = None
        self._target: Cut | None = None
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
        for _ in range(_MAX_TRIALS):
            if self._schedule is None:
                room = Room(kept.MAX_BYTES, 0 if num_images is None else self._kept.disk_bytes)
                self._schedule = Schedule(self._flow, self._stages, self._cuts, num_images or 1, room)
            self._target = self._schedule.next_cut(stage, start)
            if self._target is None or self._is_cut(self._target):
                return
            self._cuts.remove(self._target)
            self._schedule = None
        self._target = start

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
        start, output = self._kept.get(digest, self._following()) or (None, None)
        if inputs.is_meta and start is None:
            raise LostError
        with self._keeping(None if start is self._target else self._target, digest, len(inputs)):
            if start is None or output is None:
                self._model(inputs)
                return
            self.saved += start.cost * len(inputs)
            try:
                self._start(inputs, start, output)
            except Exception as error:
                self.saved -= start.cost * len(inputs)
                self._cuts, self._schedule, self._target = [], None, None
                self._kept.clear()
                raise (LostError if inputs.is_meta else RestartError) from error

    def _start(self, inputs: Tensor, cut: Cut, output: Tensor) -> object:
        """The model's output, computed from the end of the cut's call on."""
        device_type = output.device.type
        autocast = torch.is_autocast_enabled(device_type)
        mode = _NothingComputed(self._shapes.setdefault((inputs.shape, inputs.stride()), []))

        def hand_over(_output: Tensor) -> Tensor:
            mode.ended = True
            torch.set_autocast_enabled(device_type, autocast)
            return output  # a copy, since what follows may write into it

        with _at_cut(self._modules[cut.module], cut.number, hand_over):
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
    def _keeping(self, cut: Cut | None, digest: bytes, num_images: int) -> Iterator[None]:
        if cut is None:
            yield
            return

        def keep(output: Tensor) -> None:
            if not output.is_meta:  # else this batch starts behind it
                self._kept.put(digest, cut, output, place_bytes)

        place_bytes = None
        if self._num_images is not None and self._schedule is not None:
            place_bytes = ceil(self._schedule.largest() * num_images)
        with _at_cut(self._modules[cut.module], cut.number, keep):
            yield

    def _is_cut(self, cut: Cut) -> bool:
        """Whether two images get the very output that they get without this cut; tried once."""
        if cut not in self._works and self._try(cut):
            self._works.add(cut)
        return cut in self._works

    def _try(self, cut: Cut) -> bool:
        outputs: list[Tensor] = []
        module = self._modules[cut.module]
        self.saved -= len(self._sample) * (2 - cut.cost)  # once from the start, once from the cut
        # Whatever a model cannot do on the meta device, it says in any kind of exception; without the cut
        # it is only slower.
        with eval_mode(self._model), torch.no_grad(), suppress(Exception):
            inputs = self._sample.to(model_device(self._model))
            with _at_cut(module, cut.number, lambda output: outputs.append(output.clone())):
                expected = self._model(inputs)
            found = self._start(inputs, cut, outputs[0])
            pairs = zip(tree_leaves(expected), tree_leaves(found), strict=True)
            return all(bitwise_equal(*pair) for pair in pairs if isinstance(pair[0], Tensor))
        return False


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
def _at_cut(module: nn.Module, number: int, do: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `do` with the output of this call of the module; what it returns, if anything, takes its place."""
    calls = count()

    def after(_module: nn.Module, _args: object, output: Tensor) -> Tensor | None:
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
