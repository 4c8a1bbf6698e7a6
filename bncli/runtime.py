"""How to compute: device, precision, memory format, threads. Chosen once, recorded in checkpoints.

`precision: auto` takes bfloat16 autocast where the hardware multiplies bfloat16 matrices fast: CUDA
from compute capability 8.0, CPUs with AVX-512-bf16 or AMX. Elsewhere bfloat16 is emulated and slow.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from bncli.config import RuntimeConfig
from bncli.errors import CompileError, DeviceError
from bncli.hardware import has_fast_bfloat16
from bncli.usable_cpus import usable_cpus
from bncli.wording import one_line, plural

_Model = TypeVar("_Model", bound=torch.nn.Module)

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_LARGE_BLOCK = 2**20  # bytes: weights and activations, not the small things in between
_HEAP_GROWTH = 64 * 2**20  # bytes by which the heap grows at least: few calls of the kernel, little unused


@dataclass(frozen=True)
class Runtime:
    """What `resolve_runtime` chose."""

    device: torch.device
    precision: torch.dtype  # torch.float32, or torch.bfloat16 for autocast with float32 weights
    memory_format: torch.memory_format
    threads: int
    compiles: bool  # the training step, and nothing else
    processes: int = 1  # that work together, each with its own threads or GPU

    @property
    def emulates_bfloat16(self) -> bool:
        """Whether bfloat16 was asked for where the hardware is not known to be fast at it."""
        return self.precision == torch.bfloat16 and not has_fast_bfloat16(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which matrix products and convolutions run in `precision`."""
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled)

    def place(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) on the device, in the memory format, which other inputs have not."""
        if images.ndim != 4:
            return images.to(self.device)
        return images.to(self.device, memory_format=self.memory_format)

    def place_model(self, model: _Model) -> _Model:
        """The model itself, moved to the device and into the memory format."""
        # PyTorch's annotations lack `memory_format` beside a device
        return model.to(device=self.device).to(memory_format=self.memory_format)  # type: ignore[call-overload, no-any-return]

    def has_room(self, num_bytes: int) -> bool:
        """Whether a GPU has its own memory, and at most half of what is free of it would be taken."""
        return self.device.type == "cuda" and 2 * num_bytes <= torch.cuda.mem_get_info(self.device)[0]

    def describe(self) -> dict[str, Any]:
        """How evaluation computes: plain values for checkpoints, JSON and headers."""
        together = {"processes": self.processes} if self.processes > 1 else {}
        return {
            "device": str(self.device),
            "precision": str(self.precision).removeprefix("torch."),
            "memory_format": str(self.memory_format).removeprefix("torch."),
            "threads": self.threads,
        } | together

    def describe_training(self) -> dict[str, Any]:
        """The same of training."""
        return self.describe() | {"compile": self.compiles}


def resolve_runtime(config: RuntimeConfig, *, default_threads: int | None = None) -> Runtime:
    """Choose device and precision, and set the number of CPU threads of this process.

    Without `runtime.threads` they are `default_threads`, such as those of a run that goes on; without these
    as many as PyTorch has, but no more than this process may use (see `bncli.usable_cpus`).

    Raises:
        DeviceError: when the device does not exist here or cannot compute in the precision asked for.
    """
    threads = config.threads or default_threads or _fitting_threads()
    if config.threads or threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    device = resolve_device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what names no device, such as a compiled kernel, means this one then
    fast_bfloat16 = has_fast_bfloat16(device)
    wants_bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and fast_bfloat16)
    return Runtime(
        device=device,
        precision=torch.bfloat16 if wants_bfloat16 else torch.float32,
        memory_format=(
            torch.channels_last if config.memory_format == "channels_last" else torch.contiguous_format
        ),
        threads=torch.get_num_threads(),
        compiles=config.compile,
    )


def _fitting_threads() -> int:
    """PyTorch's number of threads, where they can all run at once; who sets OMP_NUM_THREADS has chosen."""
    threads = torch.get_num_threads()
    return threads if os.environ.get("OMP_NUM_THREADS") else min(threads, usable_cpus().count)


def resolve_device(name: str) -> torch.device:
    """The device of a configured name.

    Raises:
        DeviceError: when it does not exist here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator and accelerator.type in {"cuda", "mps"} else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda", "mps"}:
        raise DeviceError(f"runtime.device: unknown device {name!r}; expected auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        told = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {one_line(visible)!r})"
        found = f"PyTorch {torch.__version__} finds {plural(count, 'CUDA device')}{told}"
        first = "cuda:0, " if count else ""
        raise DeviceError(
            f"runtime.device: {name!r} asked for, but {found}; use runtime.device={first}auto or cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("runtime.device: 'mps' is not available here; use runtime.device=auto or cpu")
    return device


def check_compiler(device: torch.device) -> None:
    """Compile something small, to know before a run begins whether it can be done.

    Raises:
        CompileError: when `torch.compile` fails, for example for want of a C++ compiler or of Triton.
    """
    try:
        torch.compile(torch.nn.Softplus())(torch.ones(8, device=device))
    except Exception as error:  # each backend has errors of its own
        raise _compile_error(error) from None


@contextlib.contextmanager
def short_compile_errors() -> Iterator[None]:
    """Raise CompileError in place of what PyTorch's compiler raises: up to 200 KB, with all that g++ said."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise _compile_error(error) from None


def _compile_error(error: Exception) -> CompileError:
    first_line = next(iter(str(error).strip().splitlines()), "")
    reason = (first_line or type(error).__name__)[:200].rstrip(".: ")
    return CompileError(
        f"runtime.compile: PyTorch {torch.__version__} cannot compile this: {reason}; set it to false"
    )


def map_large_blocks() -> None:
    """Let glibc give each block of 1 MiB or more pages of its own, until `keep_freed_memory`.

    For the first step of a training: what it allocates for good would otherwise lie scattered among its
    activations, and in the gaps between later steps' would not fit.
    """
    glibc = _glibc()
    if glibc is not None:
        glibc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for its next tensors; whether the C library can.

    glibc gives every block of 32 MiB or more back to the kernel when it is freed, and the top of its heap.
    The activations of a training step are such blocks: each step had the kernel find and zero their pages
    anew. Where the C library is not glibc, this does nothing. It cannot be taken back.
    """
    glibc = _glibc()
    if glibc is None:
        return False
    # numbers of glibc's malloc.h; mallopt returns 1 where it did as it was asked
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: _HEAP_GROWTH}
    return all(glibc.mallopt(parameter, value) == 1 for parameter, value in settings.items())


def release_freed_memory() -> None:
    """Give what this process has freed and kept back to the kernel, once; with glibc.

    For the time between two phases whose tensors have other sizes, which do not fit into each other's gaps.
    """
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # others have a mallopt that means other things
        library.mallopt.argtypes, library.mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
        library.malloc_trim.argtypes, library.malloc_trim.restype = (ctypes.c_size_t,), ctypes.c_int
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library without a name
        return None
    return library


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for: before a clock is read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
