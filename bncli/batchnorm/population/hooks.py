"""What enters chosen BatchNorm layers while a model computes, measured by hooks that always go away."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.hooks import RemovableHandle

from bncli.batchnorm.modes import eval_mode, not_compiled, preserved_buffers
from bncli.batchnorm.population.moments import Moments, pooled
from bncli.errors import BncliError
from bncli.forward import model_device

Recorder = Callable[[Tensor], dict[str, Moments]]


class RestartError(Exception):
    """A pass that started in the middle got stuck; from the beginning it may get through."""


class _EnoughSeenError(BaseException):
    """Ends a forward pass early. No Exception, so that no `except Exception` in a model catches it."""


def input_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a BatchNorm layer was called with."""
    x: Tensor = args[0] if args else kwargs["input"]
    return x


@contextmanager
def recording(
    model: nn.Module,
    layers: Mapping[str, _BatchNorm],
    *,
    by_batch: Collection[str] = (),
    until: Mapping[str, int] | None = None,
    forward: Callable[[Tensor], object] | None = None,
) -> Iterator[Recorder]:
    """Give a function that computes one batch and returns the moments of what entered each layer.

    Everything is in eval mode, dropout too, and nothing takes gradients. Layers that were called several
    times for the batch have the pooled moments of all uses; those that were not called are missing. The
    layers named in `by_batch` normalise by batch statistics. With `until`, calls by layer, the pass ends
    as soon as those calls were made. `forward` computes the model; what it leaves out gives meta tensors, as
    may stand for a whole batch that it knows, and a RestartError of its own means that the model itself is to
    compute this batch.

    BatchNorm is measured where it reads: behind autocast, in the type and shape that it is given. Batch
    statistics are written into the buffers, so that a layer of any kind, SyncBatchNorm on a CPU too, uses
    them in eval mode. Only with buffers in half precision, which would round them, is train mode used.

    At the end, also after an error or Ctrl-C, modes and hooks are as before, and so are the buffers of the
    layers in `by_batch`. Buffers that the caller writes meanwhile stay written.
    """
    calls: dict[str, list[Moments]] = {}
    missing: dict[str, int] = {}

    def measure(name: str, layer: _BatchNorm, x: Tensor) -> None:
        if x.is_meta:
            return
        moments = Moments.of(x)
        calls.setdefault(name, []).append(moments)
        if name in by_batch:
            _use_batch_statistics(name, layer, moments)
        if missing.get(name):
            missing[name] -= 1
            if missing[name] == 0 and not any(missing.values()):
                raise _EnoughSeenError

    def run(compute: Callable[[Tensor], object], inputs: Tensor) -> None:
        calls.clear()
        missing.clear()
        missing.update(until or {})
        with suppress(_EnoughSeenError):
            compute(inputs)

    def record(inputs: Tensor) -> dict[str, Moments]:
        placed = inputs if inputs.is_meta else inputs.to(device, non_blocking=True)
        try:
            run(forward or model, placed)
        except RestartError:
            run(model, placed)
        return {name: pooled(made).to("cpu") for name, made in calls.items()}

    device = model_device(model)
    changed = nn.ModuleList(layers[name] for name in by_batch)
    handles: list[RemovableHandle] = []
    with (
        preserved_buffers(changed),
        eval_mode(model),
        unbuilt_layers_refused(model),
        torch.no_grad(),
        not_compiled(),
    ):
        try:
            for name, layer in layers.items():
                handles.append(layer.register_forward_pre_hook(_hook(measure, name), with_kwargs=True))
            yield record
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def unbuilt_layers_refused(model: nn.Module) -> Iterator[None]:
    """Raise BncliError when a lazy module that is not built yet is called, which would build it."""
    handles: list[RemovableHandle] = []
    try:
        for module in model.modules():
            if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
                handle = module.register_forward_pre_hook(_refuse_to_build, prepend=True)
                handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(measure: Callable[[str, _BatchNorm, Tensor], None], name: str) -> Callable[..., None]:
    def before_call(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        measure(name, layer, input_of_call(args, kwargs))

    return before_call


def _refuse_to_build(module: nn.Module, _args: object) -> None:
    raise BncliError(
        f"the model has a {type(module).__name__} that is not built yet: run one batch through it first"
    )


def _use_batch_statistics(name: str, layer: _BatchNorm, moments: Moments) -> None:
    """Let the call that is about to begin normalise by these moments."""
    if moments.count == 1:
        raise BncliError(
            f"{name} sees a single value per channel in a batch, which has no batch statistics:"
            " take larger batches, or the method exact"
        )
    running_mean, running_var = layer.running_mean, layer.running_var
    assert running_mean is not None
    assert running_var is not None
    if running_mean.dtype in {torch.float32, torch.float64}:
        running_mean.copy_(moments.mean)
        running_var.copy_(moments.variance())
    else:
        layer.training = True
