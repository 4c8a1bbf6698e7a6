"""The process group of a launch: made, checked for agreement, and ended; and what it exchanges.

Each process knows all others by their ranks. Collectives are PyTorch's, over gloo between CPUs and NCCL
between GPUs. Every one of them ends within the timeout, and where a process died it ends at once.
"""

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

import bncli
from bncli.distributed.last_words import LastWords
from bncli.distributed.launch import Launch
from bncli.distributed.ranks import Ranks
from bncli.errors import PeerLostError, ProcessesError

_Value = TypeVar("_Value")
TIMEOUT = 600.0  # seconds, where none is configured


class Processes:
    """All processes of a launch, as one of them sees them: `rank` of `num_ranks`."""

    def __init__(self, words: LastWords, store: Any, device: torch.device, timeout: float) -> None:
        self.words, self.launch = words, words.launch
        launch = self.launch
        self.rank, self.num_ranks = launch.rank, launch.num_ranks
        self.device = device  # where tensors are exchanged
        self.timeout = timeout  # seconds
        self.store = store
        self._num_meetings = 0

    @property
    def is_main(self) -> bool:
        """Whether this one writes and speaks."""
        return self.rank == 0

    @property
    def ranks(self) -> Ranks:
        """The same for what any process group can do."""
        return Ranks.of(dist.group.WORLD)

    def new_group(self) -> dist.ProcessGroup:
        """Connections of their own, whose exchanges need no order among those of others."""
        with self.exchanging():
            group: dist.ProcessGroup = dist.new_group(timeout=timedelta(seconds=self.timeout))
            return group

    def gather(self, values: Tensor) -> Tensor:
        """The values (...) of every process, by rank: (num_ranks, ...). All give one shape and type."""
        gathered = values.new_empty((self.num_ranks, *values.shape), device=self.device)
        with self.exchanging():
            dist.all_gather(list(gathered), values.to(self.device).contiguous())
        return gathered.to(values.device)

    def gather_values(self, value: _Value) -> list[_Value]:
        """Any Python value of every process, by rank; they are pickled, so for small things between peers."""
        values: list[Any] = [None] * self.num_ranks
        with self.exchanging():
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: _Value) -> _Value:
        """The value of rank 0, in every process."""
        values: list[Any] = [value if self.is_main else None]
        with self.exchanging():
            dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[no-any-return]

    def wait_for_all(self) -> None:
        """Wait until all processes are here, as long as it takes: while each gives signs of life.

        Raises:
            PeerLostError: when one is gone.
        """
        self._num_meetings += 1
        keys = [f"met/{self._num_meetings}/{rank}" for rank in range(self.num_ranks)]
        with self.exchanging():
            self.store.set(keys[self.rank], "1")
            pulses = [self.words.pulse_of(rank) for rank in range(self.num_ranks) if rank != self.rank]
            while not self.store.check(keys):
                if self.words.taken() or not all(is_alive() for is_alive in pulses):
                    raise PeerLostError("another process has ended")
                time.sleep(0.05)

    @torch.no_grad()
    def copy_from_main(self, tensors: list[Tensor]) -> None:
        """Write rank 0's bits into the tensors of every process."""
        with self.exchanging():
            for tensor in tensors:
                bits = tensor.to(self.device).contiguous()
                dist.broadcast(bits, src=0)
                tensor.copy_(bits)

    @contextlib.contextmanager
    def exchanging(self) -> Iterator[None]:
        """What fails in the block fails because of another process.

        Raises:
            PeerLostError: in place of what PyTorch raises.
        """
        try:
            yield
        except RuntimeError as error:
            raise PeerLostError(" ".join(str(error).split())[:200]) from error


@contextlib.contextmanager
def processes(
    words: LastWords | None,
    device: torch.device,
    *,
    timeout: float | None = None,
    facts: Mapping[str, object] | None = None,
) -> Iterator[Processes | None]:
    """The process group for the length of the block; None where there is one process only.

    `facts` is what must be the same in every process, such as the configuration, in values that JSON has.
    Versions and the code of bncli are compared anyway. `timeout` is in seconds, for each exchange.

    Raises:
        ProcessesError: when a process does not come within the timeout, or differs from the others.
    """
    if words is None or words.launch.num_ranks == 1:
        yield None
        return
    launch, timeout = words.launch, timeout or TIMEOUT
    duration = timedelta(seconds=timeout)
    try:
        store = dist.PrefixStore(words.next_group(), words.store(duration))  # type: ignore[attr-defined]
        words.live()
        _agree(words, store, {**common_facts(), **(facts or {})}, timeout)
        words.learn_places()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.num_ranks,
            timeout=duration,
        )
    except RuntimeError as error:
        raise PeerLostError(
            f"the process group cannot be made: {' '.join(str(error).split())[:200]}"
        ) from None
    yield Processes(words, store, device, timeout)
    # not after an error, when others may be gone: then the process ends as it is
    dist.destroy_process_group()
    words.end()


def rank_device(name: str, launch: Launch | None) -> str:
    """The device of this process by its configured name: each process of a machine has a GPU of its own."""
    if launch is None or launch.num_ranks == 1 or name not in {"auto", "cuda"}:
        return name
    if torch.cuda.is_available():
        return f"cuda:{launch.local_rank}"
    return "cpu" if name == "auto" else name


@cache
def common_facts() -> dict[str, object]:
    """What must be the same in every process whatever it does."""
    root = Path(bncli.__file__).parent
    code = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return {
        "version of Python": platform.python_version(),
        "version of torch": torch.__version__,
        "version of bncli": bncli.__version__,
        "code of bncli (SHA-256)": code.hexdigest()[:16],
    }


def _agree(words: LastWords, store: Any, facts: dict[str, object], timeout: float) -> None:
    """Wait for all processes, and compare their facts with rank 0's."""
    launch = words.launch
    keys = [f"facts/{rank}" for rank in range(launch.num_ranks)]
    store.set(keys[launch.rank], json.dumps(facts))
    deadline = time.monotonic() + timeout
    while not store.check(keys):  # not `wait`, in which Python hears no signal
        if words.taken():
            raise PeerLostError("another process has ended")
        if time.monotonic() > deadline:
            late = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
            noun = "rank" if len(late) == 1 else "ranks"
            raise ProcessesError(f"{noun} {', '.join(late)} did not start within {timeout:g} seconds")
        time.sleep(0.01)
    first = json.loads(store.get(keys[0]))
    for rank, key in enumerate(keys[1:], 1):
        differing = _first_difference(first, json.loads(store.get(key)))
        if differing is not None:
            name, before, after = differing
            raise ProcessesError(
                f"rank {rank} differs from rank 0 in {name}: {before!r} in rank 0, {after!r} in rank {rank};"
                " give all the same"
            )


def _first_difference(one: object, other: object, name: str = "") -> tuple[str, object, object] | None:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one | other:
            found = _first_difference(one.get(key), other.get(key), f"{name}.{key}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if one == other else (name, one, other)
