"""Temporary changes of a model that are undone whatever happens, and the proof that they were."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bncli.batchnorm.bits import as_bytes, bitwise_equal
from bncli.batchnorm.layers import batch_norm_layers


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; at the end give every module its own earlier mode back."""
    with _mode(model, training=False):
        yield


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in train mode; at the end give every module its own earlier mode back."""
    with _mode(model, training=True):
        yield


@contextmanager
def not_compiled() -> Iterator[None]:
    """Let modules compute as they are written: compiled code leaves out hooks that came after it."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and to import it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def batch_statistics_mode(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise by batch statistics while everything else, dropout too, is in eval mode.

    At the end every module gets its own earlier mode back. The running statistics follow the batches
    meanwhile: see `preserved_buffers`.
    """
    with eval_mode(model):
        for _, layer in batch_norm_layers(model):
            layer.training = True
        yield


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    # one flag per module: a BatchNorm that was frozen in a training model must stay frozen
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Give every buffer back its bits, and every module its own buffer objects, at the end.

    Buffers are written in place, and only those that changed, so references to them stay valid. One that
    was replaced (`module.running_mean = ...`, `model.to(...)`) or set to or from None is put back.
    Parameters are not touched. Memory: one copy of all buffers.
    """
    slots = [
        (module, name, buffer) for module in model.modules() for name, buffer in list(module._buffers.items())
    ]
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # by identity: a shared buffer is copied once
    for _, _, buffer in slots:
        if buffer is not None and id(buffer) not in copies:
            copies[id(buffer)] = (buffer, buffer.detach().clone())
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in copies.values():
                if not bitwise_equal(buffer, copy):
                    buffer.copy_(copy)
        for module, name, buffer in slots:
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)


def buffers_digest(model: nn.Module) -> str:
    """SHA-256 (hexadecimal) over names, dtypes, shapes and bits of all buffers, in model order.

    Two digests are equal exactly if no bit of any buffer differs, on whatever device they are. Buffers
    that `state_dict` leaves out (persistent=False) count too.
    """
    digest = hashlib.sha256()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        # repr quotes the name, so no choice of names can imitate another header
        digest.update(f"{name!r} {buffer.dtype} {tuple(buffer.shape)}\n".encode())
        digest.update(as_bytes(buffer).cpu().numpy().data)
    return digest.hexdigest()
