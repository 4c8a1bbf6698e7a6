"""The first module of a network that treats the same image differently in two batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bncli.batchnorm.bits import bitwise_equal
from bncli.batchnorm.modes import not_compiled
from bncli.determinism.fixed_shape import FixedShape
from bncli.distributed.wrapped import as_written
from bncli.forward import forward

WHOLE_MODEL = "(model)"  # the name of the root module, whose own is empty


@dataclass(frozen=True)
class Seat:
    """One image in one batch."""

    batch: Tensor  # (N, ...)
    row: int


def first_differing_layer(model: nn.Module, first: Seat, second: Seat) -> str:
    """The name of the module in which the two computations of one image part, bit by bit.

    Both batches are computed again, and what enters and leaves every module for that image is compared in
    order of execution. Where a module's output is the first to differ, it is that module; where an input
    is, it is the module whose own code made that input. "(model)" is the root, also where nothing differs
    when it is computed again. Inside a FixedShape it is the wrapped network that is looked into.
    """
    if isinstance(model, FixedShape):
        first, second = (Seat(*model.chunk_of(seat.batch, seat.row)) for seat in (first, second))
        model = model.model
    model = as_written(model)
    for (name, one), (_, two) in zip(_trace(model, first), _trace(model, second), strict=False):
        # of other shapes are only tensors that do not belong to the image, such as a table of positions
        if one.shape == two.shape and not bitwise_equal(one, two):
            return name
    return WHOLE_MODEL


def _trace(model: nn.Module, seat: Seat) -> list[tuple[str, Tensor]]:
    """Who made what, for one image: pairs of a module's name and a tensor, in order of execution."""
    trace: list[tuple[str, Tensor]] = []
    with _recording(model, seat, trace), not_compiled(), torch.no_grad():
        forward(model, seat.batch)
    return trace


@contextmanager
def _recording(model: nn.Module, seat: Seat, trace: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Add to `trace` while the model computes; every hook is gone at the end, also after an error."""
    names = {module: name or WHOLE_MODEL for name, module in model.named_modules()}
    running: list[str] = []  # the modules that are being computed, the innermost last

    def enter(module: nn.Module, inputs: object) -> None:
        maker = running[-1] if running else WHOLE_MODEL
        trace.extend((maker, row) for row in _rows(inputs, seat))
        running.append(names[module])

    def leave(module: nn.Module, _inputs: object, output: object) -> None:
        trace.extend((names[module], row) for row in _rows(output, seat))
        running.pop()

    handles = []
    try:
        for module in names:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(value: object, seat: Seat) -> Iterator[Tensor]:
    """Copies of the part of every tensor in there that belongs to the image; empty where there is none."""
    if isinstance(value, Tensor):
        size, rest = divmod(len(value), len(seat.batch)) if value.dim() else (0, 0)
        size = 0 if rest else size  # more than one: windows or steps of one image, flattened
        start = seat.row * size
        yield value.detach()[start : start + size].cpu().clone() if size else torch.empty(0)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _rows(item, seat)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _rows(item, seat)
