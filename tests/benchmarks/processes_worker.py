"""One process of a benchmark of several: takes some training steps, and rank 0 prints what they took.

    [torchrun ...] -m tests.benchmarks.processes_worker CONFIG STEPS DELAY_MS GIGABITS

With a delay, exchanges end no sooner than over a network of that delay and speed: each waits for its turn on
the one link, for its bytes, and for the delay of each of its hops. What is computed meanwhile goes on.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bncli.config_file import load_config
from bncli.distributed import LastWords, Processes, launched, processes
from bncli.training import prepare
from bncli.training.last_good_step import LastGoodStep
from bncli.training.loop import take_step
from bncli.training.run import Run

WARM_UP = 2  # steps


class Link:
    """A ring of processes over one slow link in place of a fast one."""

    def __init__(self, num_ranks: int, delay: float, gigabits: float) -> None:
        self._hops = num_ranks - 1
        self._num_ranks, self._delay, self._gigabits = num_ranks, delay, gigabits
        self._free_at = 0.0

    def end_of(self, num_bytes: int, *, reduces: bool) -> float:
        """When an exchange of so many bytes ends that begins now: of all_reduce, or of all_gather."""
        rounds = 2 * self._hops if reduces else self._hops
        sent = num_bytes / self._num_ranks * rounds if reduces else num_bytes * rounds
        self._free_at = max(time.perf_counter(), self._free_at) + sent * 8 / (self._gigabits * 1e9)
        return self._free_at + rounds * self._delay

    def install(self) -> None:
        """Let training use it: the process group stays, and answers later."""
        all_reduce, all_gather = dist.all_reduce, dist.all_gather

        def slow_all_reduce(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            end = self.end_of(tensor.nbytes, reduces=True)
            return _Later(all_reduce(tensor, *args, **options), end)

        def slow_all_gather(tensors: list[torch.Tensor], tensor: torch.Tensor) -> None:
            end = self.end_of(tensor.nbytes, reduces=False)
            all_gather(tensors, tensor)
            _sleep_until(end)

        dist.all_reduce, dist.all_gather = slow_all_reduce, slow_all_gather


class _Later:
    """An exchange under way."""

    def __init__(self, work: Any, end: float) -> None:
        self._work, self._end = work, end

    def wait(self) -> None:
        self._work.wait()
        _sleep_until(self._end)


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


def measure(config_path: str, num_steps: int, team: Processes | None) -> dict[str, Any]:
    """Images per second of the whole batch, and memory of every process."""
    config = load_config(Path(config_path))
    setup = prepare(config, processes=team)
    run = Run.start(setup)
    run.model.train()
    last_good = LastGoodStep(run)
    batches = run.batches()
    for _ in range(WARM_UP):
        take_step(run, last_good, *next(batches))
    start, first = time.perf_counter(), run.step
    while run.step < first + num_steps:
        take_step(run, last_good, *next(batches))
    seconds = time.perf_counter() - start
    own = torch.tensor([_proportional_mib(), float(setup.runtime.threads)], dtype=torch.float64)
    everyone = own.view(1, -1) if team is None else team.gather(own)
    return {
        "images_per_second": num_steps * setup.plan.batch_size / seconds,
        "memory_mib": everyone[:, 0].tolist(),
        "threads": everyone[:, 1].tolist(),
        "gradient_bytes": sum(w.nbytes for w in run.model.parameters() if w.requires_grad),
        "image_mib": sum(s.images.nbytes for s in (setup.dataset.train, setup.dataset.test)) / 2**20,
    }


def _proportional_mib() -> float:
    """Resident memory of this process, where a page that n processes share counts as 1/n of one."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def main(path: str, steps: str, delay_ms: str, gigabits: str) -> None:
    launch = launched()
    words = LastWords(launch) if launch is not None else None
    with processes(words, torch.device("cpu")) as team:
        if team is not None and float(delay_ms) > 0:
            Link(team.num_ranks, float(delay_ms) / 1000, float(gigabits)).install()
        found = measure(path, int(steps), team)
        if team is None or team.is_main:
            print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
