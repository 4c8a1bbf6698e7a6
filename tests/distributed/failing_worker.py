"""A program with bncli's messages and exit codes, whose processes fail as they are told.

torchrun ... tests/distributed/failing_worker.py train HOW [RANK]
"""

import os
import signal
import sys
import time

import torch
import typer

from bncli.cli.app import main
from bncli.cli.one_voice import last_words
from bncli.distributed import processes
from bncli.errors import DataError

app = typer.Typer()


@app.command()
def train(how: str, rank: int = 1, timeout: float = 60) -> None:
    """Exchange something twice, and fail between."""
    words = last_words()
    assert words is not None
    mine = words.launch.rank == rank
    if how == "early" and mine:
        raise DataError("no data here")
    if how == "never" and mine:
        time.sleep(60)
    with processes(
        words, torch.device("cpu"), timeout=timeout, facts={"seed": {"of": how == "other" and mine}}
    ) as team:
        assert team is not None
        total = team.gather(torch.tensor([team.rank])).flatten().tolist()
        print(f"{total} speaks", flush=True)
        if how == "error" and mine:
            raise DataError("no data here")
        if how == "bug" and mine:
            raise ZeroDivisionError("a bug")
        if how == "kill" and mine:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "silent" and mine:
            time.sleep(60)
        team.gather(torch.zeros(3))
        print("done", flush=True)


@app.command()
def history() -> None:
    """A command of one process."""
    print("done")


if __name__ == "__main__":
    sys.exit(main(None, app, "bncli"))
