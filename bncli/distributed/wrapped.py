"""A model as it is inside PyTorch's wrappers for many processes, for forward passes that no rank waits in.

DistributedDataParallel hands rank 0's buffers to all others before every forward pass, in eval mode too;
with FSDP2 (`fully_shard`) every forward pass gathers parameters. A rank with fewer batches than another
would keep the others waiting. Both are undone for a while: the module inside DDP computes, and sharded
parameters are gathered once, whole, in the precision they are kept in.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bncli.errors import BncliError


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, compiled or not; any other as it is."""
    inside = _uncompiled(model)
    return unwrapped(inside.module) if isinstance(inside, DistributedDataParallel) else model


def as_written(model: nn.Module) -> nn.Module:
    """The same, and not compiled: whose layers have the names that they have in its checkpoints."""
    return _uncompiled(unwrapped(model))


def _uncompiled(model: nn.Module) -> nn.Module:
    # what was never compiled needs no import of the compiler, which takes a second
    dynamo: Any = sys.modules.get("torch._dynamo")
    return model._orig_mod if dynamo and isinstance(model, dynamo.OptimizedModule) else model


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Give a model that `fully_shard` has divided all its parameters, and none of its hooks, for a while.

    All ranks must enter it. Memory: one copy of the parameters. Buffers stay the model's own. Raises
    BncliError for the older FullyShardedDataParallel.
    """
    # what was never imported cannot be here, and importing it takes half a second
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    modules = [] if fsdp is None else list(model.modules())
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in modules):
        raise BncliError("FullyShardedDataParallel keeps parameters in pieces: use fully_shard (FSDP2)")
    sharded = [module for module in modules if isinstance(module, fsdp.FSDPModule)]
    if not sharded:
        yield
        return
    from torch.distributed.tensor import DTensor

    for module in sharded:
        module.reshard()  # the root may hold them whole since the latest forward pass
    kept = [(module, dict(module._parameters)) for module in modules]
    hooks = [
        _without_fsdp(table) for one in modules for table in (one._forward_pre_hooks, one._forward_hooks)
    ]
    try:
        with torch.no_grad():
            for module, parameters in kept:
                for name, parameter in parameters.items():
                    if isinstance(parameter, DTensor):
                        full = nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
                        module._parameters[name] = full
        yield
    finally:
        for module, parameters in kept:
            module._parameters.update(parameters)
        for table, before in hooks:
            table.clear()
            table.update(before)


def _without_fsdp(table: dict[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Take FSDP's own hooks out of a module's table; the table, and what it was."""
    before = dict(table)
    for key, hook in before.items():
        if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):
            del table[key]
    return table, before
