"""BatchNorm in a state dict: which prefixes are its layers, and which entries belong to one.

A layer is known by `running_mean` and `running_var` of one shape (C,) in a floating-point type under one
prefix. What is asked of an entry is its shape and type, so that tensors in memory and tensors that still lie
in a file are recognised alike.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

# the types that BatchNorm computes in; what else is called running_mean is none of it
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COUNTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
MAX_COUNTS = 64  # a counter is one number; of some more the type is told, and no count


def batch_norm_names(state: Mapping[str, object]) -> list[str]:
    """The prefixes of all layers with running statistics, in the order of the state dict."""
    names = []
    for key in state:
        prefix, dot, leaf = key.rpartition(".") if isinstance(key, str) else ("", "", "")
        if leaf == "running_mean" and _are_statistics(state, f"{prefix}{dot}"):
            names.append(prefix)
    return names


def batch_norm_keys(
    state: Mapping[str, object], name: str, num_features: int | None = None
) -> dict[str, str]:
    """The entries of one layer that fit together, by what they are: `running_mean`, `weight`, ...

    `num_features` is that of a layer whose statistics may be missing.
    """
    path = f"{name}." if name else ""
    found = []
    if _are_statistics(state, path):
        found += ["running_mean", "running_var"]
        num_features = _shape(state[f"{path}running_mean"])[0]
    for leaf in ("weight", "bias"):
        entry = state.get(f"{path}{leaf}")
        if _is_per_channel(entry) and _shape(entry)[0] == num_features:
            found.append(leaf)
    counter = state.get(f"{path}num_batches_tracked")
    if math.prod(_shape(counter)) <= MAX_COUNTS and getattr(counter, "dtype", None) in COUNTS + FLOATS:
        found.append("num_batches_tracked")
    return {leaf: f"{path}{leaf}" for leaf in found}


def _are_statistics(state: Mapping[str, object], path: str) -> bool:
    mean, var = state.get(f"{path}running_mean"), state.get(f"{path}running_var")
    return _is_per_channel(mean) and _is_per_channel(var) and _shape(mean) == _shape(var)


def _is_per_channel(entry: object) -> bool:
    shape = _shape(entry)
    return len(shape) == 1 and shape[0] > 0 and getattr(entry, "dtype", None) in FLOATS


def _shape(entry: object) -> tuple[int, ...]:
    """() also for what has none, and for a tensor that a lazy layer has not made yet."""
    if isinstance(entry, Tensor) and is_lazy(entry):
        return ()
    return tuple(getattr(entry, "shape", ()))
