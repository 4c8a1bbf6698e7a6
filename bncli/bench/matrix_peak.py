"""How fast this machine multiplies matrices: the yardstick for a share of its peak, and between machines."""

import time

import torch

from bncli.runtime import synchronize


def matrix_gflops(device: torch.device, precision: torch.dtype, size: int = 2048) -> float:
    """The best of several products of square matrices, in 1e9 floating-point operations a second."""
    matrix = torch.randn(size, size, device=device).to(precision)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
