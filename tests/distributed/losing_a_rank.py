"""A program for torchrun, in which the last rank dies or sleeps in the midst of a measurement.

The others write what they were told, and after how many seconds, to FOLDER/RANK.json.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bncli.batchnorm import measure_population
from bncli.errors import BncliError
from tests.batchnorm.networks import Residual

TIMEOUT = 4.0  # seconds


def main(fate: str, method: str, folder: Path) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends once it sees a rank gone
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    rank, is_last = dist.get_rank(), dist.get_rank() == dist.get_world_size() - 1
    began = time.monotonic()
    passes = 0

    def batches() -> Iterator[Tensor]:
        nonlocal began, passes
        passes += 1
        for number in range(40):
            if number == 20 and passes >= (3 if method == "exact" else 1):
                began = time.monotonic()
                if is_last and fate == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if is_last:
                    time.sleep(600)
            yield torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1000 * rank + number))

    try:
        measure_population(Residual(), batches, method=method, group=dist.group.WORLD)  # type: ignore[arg-type]
        told = "no error"
    except BncliError as error:
        told = f"{type(error).__name__}: {error}"
    found = {"told": told, "seconds": time.monotonic() - began}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    os._exit(3)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
