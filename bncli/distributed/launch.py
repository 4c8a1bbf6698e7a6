"""Which of several processes this is, as torchrun tells it in the environment. Imports no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from bncli.errors import ProcessesError

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """One process of a launch."""

    rank: int  # from 0
    num_ranks: int
    local_rank: int  # among those of its machine, from 0
    restarts: int = 0  # how often torchrun has started all of them anew
    max_restarts: int = 0
    num_local: int | None = None  # processes on its machine; None: not told

    @property
    def is_main(self) -> bool:
        """Whether this one speaks and writes."""
        return self.rank == 0


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """This process in its launch; None outside torchrun (and what sets the same variables).

    Raises:
        ProcessesError: when the environment contradicts itself.
    """
    if not all(name in environment for name in _NAMES):
        return None
    rank, num_ranks = (_number(environment, name) for name in _NAMES[:2])
    if not rank < num_ranks:
        raise ProcessesError(f"RANK={rank} with WORLD_SIZE={num_ranks}: start with torchrun")
    return Launch(
        rank=rank,
        num_ranks=num_ranks,
        local_rank=_number(environment, "LOCAL_RANK", rank),
        restarts=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
        max_restarts=_number(environment, "TORCHELASTIC_MAX_RESTARTS", 0),
        num_local=_number(environment, "LOCAL_WORLD_SIZE", 0) or None,
    )


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        number = int(text or "")
    except ValueError:
        number = -1
    if number < 0:
        raise ProcessesError(f"{name}={text}: must be a whole number, at least 0; start with torchrun")
    return number
