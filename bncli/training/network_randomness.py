"""What a network itself draws at random in a step, such as dropout: a function of (seed, epoch, step, part).

So a step is the same whether or not the ones before were taken, and whoever computes its parts. PyTorch's
global generators are left as they were. Other generators, such as Python's `random`, are not followed.
"""

import contextlib
from collections.abc import Iterator

import torch

from bncli.data.randomness import Stream, generator


@contextlib.contextmanager
def network_randomness(
    device: torch.device, seed: int, epoch: int, step: int, part: int = 0
) -> Iterator[None]:
    """Let PyTorch's generators draw for one part of a step; all three count from 0."""
    devices = [device] if device.type != "cpu" else []
    kind = device.type if devices else "cuda"  # which matters only with devices
    with torch.random.fork_rng(devices, device_type=kind):
        # the CPU's generator keeps no more than 32 bits
        where = (epoch, step, part) if part else (epoch, step)
        value = int(generator(Stream.NETWORK, seed, *where).integers(2**32))
        if device.type == "cpu":
            # torch.manual_seed would format three stack traces, for GPUs that come into use later
            torch.default_generator.manual_seed(value)
        else:
            torch.manual_seed(value)
        yield
