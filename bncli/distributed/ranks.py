"""The processes (ranks) that share one measurement: what they exchange, and errors that end all of them.

A rank that raises while others wait for it would leave them waiting for the group's whole timeout. So every
exchange can carry an error in place of a value, and every rank then raises. How long an exchange may take is
the process group's own timeout: `init_process_group(timeout=...)`.

Values travel pickled, between the processes of one program. On a GPU's group (nccl) they go over the GPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from bncli.errors import BncliError, PeerLostError, ProcessesError, StoppedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Value = TypeVar("Value")


class RankError(ProcessesError):
    """What another rank could not do."""


class RankStoppedError(StoppedError):
    """Another rank was asked to stop, so that all do."""


@dataclass(frozen=True)
class _Told:
    value: object
    error: str | None = None
    stops: bool = False


@dataclass(frozen=True)
class Ranks:
    """The processes of a group; a single one without any."""

    group: "ProcessGroup | None" = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: "ProcessGroup | None") -> "Ranks":
        """Those of a process group. Raises BncliError in a process that is not in it."""
        if group is None:
            return cls()
        rank = dist.get_rank(group)
        if rank < 0:
            raise BncliError(f"process {dist.get_rank()} is not in the group that it was given")
        return cls(group, rank, dist.get_world_size(group))

    def images_so_far(self, num_own: int, num_batches: int, batch_size: int) -> int:
        """At least how many images all ranks have, while this one has so many, of batches dealt in turn."""
        return num_own + max(0, num_batches - 1) * (self.size - 1) * batch_size

    def gather(self, value: Value) -> list[Value]:
        """The value that each rank gives, in order of ranks: the same list on all of them.

        Raises RankError where another rank failed, RankStoppedError where one was asked to stop,
        PeerLostError where one ended or did not answer in time.
        """
        if self.size == 1:
            return [value]
        told = self._exchange(_Told(value))
        for rank, one in enumerate(told):
            if one.stops:
                raise RankStoppedError
            if one.error is not None:
                raise RankError(f"rank {rank}: {one.error}")
        return [one.value for one in told]  # type: ignore[misc]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What every rank does as a whole, or none: an error of one ends it with an error on all.

        All exchanges in between must come in the same order on every rank.
        """
        try:
            yield
        except (RankError, RankStoppedError, PeerLostError):
            raise
        except Exception as error:
            self._tell(error)
            raise
        self.gather(None)  # else a rank that fails behind the last exchange would wait for the others

    def _tell(self, error: Exception) -> None:
        text = str(error) if isinstance(error, BncliError) else f"{type(error).__name__}: {error}"
        if self.size > 1:
            try:
                self._exchange(_Told(None, text, isinstance(error, StoppedError)))
            except PeerLostError:
                return  # nobody is left to be told

    def _exchange(self, told: _Told) -> list[_Told]:
        found: list[_Told] = [told] * self.size
        try:
            dist.all_gather_object(found, told, group=self.group)
        except RuntimeError as error:  # of gloo or nccl
            reason = " ".join(str(error).split())[:200]
            raise PeerLostError(
                f"rank {self.rank} of {self.size}: another process ended, or did not answer within the"
                f" group's timeout: {reason}"
            ) from error
        return found


ALONE = Ranks()
