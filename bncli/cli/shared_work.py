"""A command's work divided among the processes that torchrun started; rank 0 speaks and writes for all."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bncli.cli.one_voice import last_words

if TYPE_CHECKING:
    from bncli.cli.opened_checkpoint import Subject
    from bncli.distributed import Processes, Ranks


@dataclass(frozen=True)
class SharedWork:
    """With whom this process works, or that it is alone."""

    ranks: "Ranks"
    processes: "Processes | None" = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.ranks.rank == 0


@contextmanager
def shared_work(subject: "Subject", **options: object) -> Iterator[SharedWork]:
    """What the processes of this launch do together in the block; one alone without torchrun.

    All must have the same checkpoint, configuration and `options`.

    Raises:
        ProcessesError: when a process does not come, or differs from the others.
    """
    from bncli.checkpoints import file_sha256
    from bncli.distributed import ALONE, processes

    words, facts = last_words(), {}
    if words is not None:
        facts = {
            "the checkpoint (SHA-256)": file_sha256(subject.path) if subject.path.is_file() else None,
            "the configuration": subject.config.model_dump(mode="json"),
            "the options": {name: str(value) for name, value in options.items()},
        }
    device, timeout = subject.runtime.device, subject.config.runtime.timeout
    with processes(words, device, timeout=timeout, facts=facts) as found:
        yield SharedWork(ALONE) if found is None else SharedWork(found.ranks, found)
