"""What each process of a launch does in the tests of training: runs in float64, one after the other.

    torchrun ... -m tests.distributed.training_worker FOLDER CASE ...

Each process leaves its network's state in FOLDER/CASE-RANK.pt, and how its images lie in memory.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from bncli.config import Config
from bncli.config_file import load_config
from bncli.distributed import LastWords, launched
from bncli.training import Started, train

TINY = [
    "data.num_train=72",  # 4 batches of 16 and one of 8: 50 steps in 10 epochs
    "data.num_test=50",
    "train.epochs=10",
    "train.batch_size=16",
    "train.evaluate_every=5",
    "train.last_batch=keep",
    "train.learning_rate=0.02",
    "runtime.device=cpu",
    "runtime.precision=float32",
    "runtime.threads=1",
    "runtime.eval_batch_size=20",
]
SMALL = ["model.widths=[6, 8]", "model.blocks_per_stage=1"]
CASES = {
    "parts": [*SMALL, "train.micro_batch_size=5"],  # 4 parts of 4; of the last batch 2, fewer than 3 ranks
    "uneven": [
        *SMALL,
        "train.micro_batch_size=3",
        "data.num_train=77",
        "train.ema_epochs=1",
    ],  # 6 parts; then 5
    "sync": [*SMALL, "model.batch_norm.sync=true"],
    "awkward": [f"model.name={Path(__file__).parent / 'own_network.py'}:awkward", "train.micro_batch_size=4"],
    "compiled": [*SMALL, "train.micro_batch_size=4", "runtime.compile=true"],
}


def config_of(case: str) -> Config:
    """The configuration of a case."""
    return load_config(None, [*TINY, *CASES[case]])


def run_case(case: str, folder: Path, words: LastWords | None, rank: int) -> None:
    """Train, and leave what this process ended with."""
    setups: list[Any] = []
    torch.set_default_dtype(torch.float64)
    try:
        result = train(
            config_of(case),
            folder / case,
            report=lambda event: setups.append(event.setup) if isinstance(event, Started) else None,
            words=words,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    (setup,) = setups
    images = setup.dataset.train.images
    left = {"state": setup.model.state_dict(), "map": _map_of(images.data_ptr()), "result": result.to_dict()}
    torch.save(left | {"result": str(left["result"]["test_accuracy"])}, folder / f"{case}-{rank}.pt")


def _map_of(address: int) -> str:
    """What the kernel calls the memory at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            return " ".join(line.split()[5:])
    return ""


if __name__ == "__main__":
    launch = launched()
    assert launch is not None
    last_words = LastWords(launch)
    for name in sys.argv[2:]:
        run_case(name, Path(sys.argv[1]), last_words, launch.rank)
