"""A device of its own on a machine that has none: the values lie on the CPU, the rules are those of a GPU.

Its tensors mix with tensors of the CPU in no operation, apart from numbers without a dimension and the
indices of a tensor, as on CUDA. Every look at a value makes the CPU wait, and is counted by the operation
that does so. Results have the CPU's bits: what is computed there can be compared bit for bit.

It is built from PyTorch's hooks for backends written in Python, which are experimental, and stays for the
rest of the process.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
NAME = "sim"
# what reads values to go on; on CUDA each of them waits until the device has done all before
WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.item.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
}
COPIES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}
TAKES_CPU_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class MixedDevicesError(RuntimeError):
    """Tensors of two devices in one operation."""


class SimTensor(torch.Tensor):
    """Holds a tensor of the CPU."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> "SimTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        made.raw = raw
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SimTensor({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


waits: Counter[str] = Counter()
copies: Counter[str] = Counter()


class _Factories(TorchDispatchMode):
    """Lets functions that make tensors make them on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, _ = tree_flatten((args, kwargs))
    tensors = [one for one in flat if isinstance(one, torch.Tensor)]
    here = [one for one in tensors if isinstance(one, SimTensor)]
    asked = kwargs.get("device")
    if not here and not _is_here(asked):
        return func(*args, **kwargs)
    others = [one for one in tensors if not isinstance(one, SimTensor) and one.dim() > 0]
    if here and others and func not in COPIES and func not in TAKES_CPU_INDICES:
        raise MixedDevicesError(f"{func}: found at least two devices, {NAME}:0 and cpu")
    if func in WAITS or (func in TAKES_CPU_INDICES and _has_mask(args)):
        waits[str(func)] += 1
    to_cpu = (here and asked is not None and not _is_here(asked)) or (
        func is aten.copy_.default and not isinstance(args[0], SimTensor)
    )
    to_here = not here and tensors and _is_here(asked)
    if (to_cpu or to_here or (func is aten.copy_.default and others)) and not kwargs.get("non_blocking"):
        waits[f"copy {'to the CPU' if to_cpu else 'from the CPU'}"] += 1
    wrappers = {id(one.raw): one for one in here}
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    found = func(*_raw(args), **_raw(kwargs))

    def wrapped(value: torch.Tensor) -> torch.Tensor:
        if to_cpu and func is not aten.copy_.default:
            return value
        return wrappers[id(value)] if id(value) in wrappers else SimTensor(value)

    if to_cpu and func is aten.copy_.default:
        return args[0]
    return tree_map_only(torch.Tensor, wrapped, found)


def _raw(values: Any) -> Any:
    return tree_map_only(SimTensor, lambda one: one.raw, values)


def _has_mask(args: Any) -> bool:
    return any(one is not None and one.dtype in {torch.bool, torch.uint8} for one in args[1])


class _Module(ModuleType):
    """What torch.cuda is to CUDA, as far as it is asked for."""

    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = manual_seed = staticmethod(lambda seed: None)
    is_available = is_initialized = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_rng_state = staticmethod(lambda device=0: torch.zeros(1, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda state, device=0: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    synchronize = staticmethod(lambda device=None: None)
    device = staticmethod(lambda index: _nothing())


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def install() -> torch.device:
    """The device, for the rest of this process."""
    # Before there is the device, or autograd starts a thread for it, which now and then ends the process
    torch.ones(1, requires_grad=True).sum().backward()
    torch.autograd.set_multithreading_enabled(False)
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(NAME))
    _Factories().__enter__()
    return torch.device(NAME, 0)
