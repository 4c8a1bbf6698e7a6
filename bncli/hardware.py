"""What the machine is: whether it is fast at bfloat16, its processor, and the versions on it.

Knows nothing of a configuration, so that everything below `bncli.runtime` may ask as well.
"""

import os
import platform
from typing import Any

import torch


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = _cpu_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def has_amx() -> bool:
    """Whether the processor multiplies bfloat16 matrices in tiles: AMX."""
    return bool(_cpu_capabilities().get("amx_bf16"))


def describe_machine() -> dict[str, Any]:
    """Versions and hardware, as plain values: what a number is worth nothing without."""
    import bncli

    machine: dict[str, Any] = {
        "bncli": bncli.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_cpus": os.cpu_count(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["cuda"] = torch.version.cuda
    return machine


def _cpu_name() -> str:
    name = _cpu_capabilities().get("cpu_name")
    return str(name or platform.processor() or "unknown")


def _cpu_capabilities() -> dict[str, Any]:
    # absent from some versions of PyTorch; without it `auto` stays with float32, which always works
    return dict(getattr(torch.cpu, "get_capabilities", dict)())
