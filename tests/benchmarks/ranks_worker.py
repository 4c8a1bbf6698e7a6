"""What one process measures for `tests.benchmarks.ranks`, alone or as one of those that torchrun starts.

Each has only its own images. Rank 0 prints a JSON line: seconds of each measurement after one to warm up,
between two moments that all processes reach together, and the peak memory of every process.
"""

import argparse
import json
import resource
import sys
import time
from typing import Literal

import torch
import torch.distributed as dist

from bncli.batchnorm import measure_population
from bncli.distributed import Ranks, launched
from bncli.indexed import in_order
from tests.benchmarks.population import network_of


def work(
    network: str,
    method: Literal["exact", "precise"],
    num_images: int,
    batch_size: int,
    image_size: int,
    repeats: int,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    if launched() is not None:
        dist.init_process_group("gloo")
    group = dist.group.WORLD if dist.is_initialized() else None
    ranks = Ranks.of(group)
    model = network_of(network, image_size)
    own = list(in_order(num_images, batch_size))[ranks.rank :: ranks.size]
    batches = [
        torch.randn(len(batch), 3, image_size, image_size, generator=torch.Generator().manual_seed(batch[0]))
        for batch in own
    ]
    seconds = []
    for _ in range(repeats + 1):
        ranks.gather(None)
        start = time.perf_counter()
        measure_population(model, batches, method=method, group=group)
        ranks.gather(None)
        seconds.append(time.perf_counter() - start)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    peaks = ranks.gather(peak)
    if ranks.rank == 0:
        print(json.dumps({"seconds": seconds[1:], "peak_mib": peaks}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("network", "method"):
        parser.add_argument(f"--{name}")
    for name in ("num-images", "batch-size", "image-size", "repeats", "threads"):
        parser.add_argument(f"--{name}", type=int)
    work(**vars(parser.parse_args()))
