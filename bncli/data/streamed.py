"""Inputs that are read by worker processes whenever they are asked for: none of them stays in memory.

Workers read a few inputs at a time, ahead of what is asked for, and give them back through a pipe. So
/dev/shm, which is small in containers, is not used, and memory does not grow with the number of inputs. Each
worker computes with one thread. What is wrong with an input is told by the process that asked for it.
"""

import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bncli.data.decode import bombs_refused
from bncli.errors import DataError
from bncli.indexed import NO_LABEL, Indices, in_order
from bncli.usable_cpus import usable_cpus
from bncli.wording import plural

Sample = tuple[npt.NDArray[Any], int]
"""An input, and its label or NO_LABEL."""
_Chunk = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]

_CHUNK = 16  # inputs that a worker reads at a time: workers share a batch, and few inputs wait in memory
_FEW = 2  # chunks, which take less time than the start of workers


class StreamedSplit:
    """A split whose inputs `read` gives one by one, in worker processes; it raises DataError.

    Where `labels` are not given, all inputs are read once when they are asked for, unless it is known that
    there are none (`are_labelled`). `identity` tells the inputs from others, as far as that is known without
    reading them. `name` is what errors call the data set. `num_workers` None is as many as there
    are CPUs for this process; 0 reads in this process.
    """

    can_shuffle = True
    device = torch.device("cpu")

    def __init__(
        self,
        read: Callable[[int], Sample],
        size: int,
        *,
        labels: Tensor | None = None,
        are_labelled: bool = True,
        identity: bytes = b"",
        name: str = "",
        num_workers: int | None = None,
    ) -> None:
        self.identity, self._name = identity, name
        self._read, self._size, self._known_labels = read, size, labels
        self._are_labelled = are_labelled
        self._num_workers = default_workers() if num_workers is None else num_workers

    def relabelled(self, new_labels: Tensor) -> "StreamedSplit":
        """The same with `new_labels[label]` for each label; the last one is for NO_LABEL."""
        labels = None if self._known_labels is None else new_labels[self._known_labels]
        return StreamedSplit(
            _Relabelled(self._read, new_labels),
            self._size,
            labels=labels,
            are_labelled=self._are_labelled,
            identity=self.identity,
            name=self._name,
            num_workers=self._num_workers,
        )

    def __repr__(self) -> str:
        """How many inputs of what shape."""
        shape = "x".join(map(str, self.image_shape))
        return f"StreamedSplit({len(self):,} inputs of {shape}, {plural(self._num_workers, 'worker')})"

    def __len__(self) -> int:
        """Return the number of inputs."""
        return self._size

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of the first input."""
        return tuple(self._first.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first input; the others must have the same."""
        return torch.from_numpy(self._first).dtype

    @cached_property
    def labels(self) -> Tensor | None:
        """(N,) int64; None: there are none."""
        if self._known_labels is not None or not self._are_labelled:
            return self._known_labels
        found = torch.cat([labels for _, labels in self.batches_of(in_order(len(self), _CHUNK))])
        return None if bool((found == NO_LABEL).all()) else found

    @cached_property
    def _first(self) -> npt.NDArray[Any]:
        with bombs_refused():
            return self._read(0)[0]

    def batches_of(self, batches: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs (B, ...) and labels (B,) of every batch.

        Raises:
            DataError: an input cannot be read, or has another shape than the first one.
        """
        sizes: deque[int] = deque()  # of the batches that are being read

        def chunks() -> Iterator[list[int]]:
            for batch in batches:
                numbers = list(batch) if isinstance(batch, range) else batch.tolist()
                if numbers:
                    sizes.append(len(numbers))
                for start in range(0, len(numbers), _CHUNK):
                    yield numbers[start : start + _CHUNK]

        with closing(self._read_chunks(chunks())) as found:
            for inputs, labels in found:
                size, done = sizes.popleft(), len(labels)
                if done < size:
                    whole = np.empty((size, *inputs.shape[1:]), inputs.dtype), np.empty(size, np.int64)
                    whole[0][:done], whole[1][:done] = inputs, labels
                    while done < size:
                        inputs, labels = next(found)  # noqa: PLW2901
                        place = slice(done, done + len(labels))
                        whole[0][place], whole[1][place] = inputs, labels
                        done = place.stop
                    inputs, labels = whole  # noqa: PLW2901
                yield torch.from_numpy(inputs), torch.from_numpy(labels)

    def _read_chunks(self, chunks: Iterator[list[int]]) -> Generator[_Chunk, None, None]:
        reader = _ChunkReader(self._read, self._first, self._name)
        begun = list(islice(chunks, _FEW + 1))
        several = self._num_workers > 0 and len(begun) > _FEW
        read = self._in_workers if several else _in_this_process
        try:
            with closing(read(reader, chain(begun, chunks))) as results:
                for result in results:
                    if isinstance(result, str):
                        raise DataError(result)
                    yield result
        except OSError as error:
            raise DataError(
                f"data.workers: cannot start {self._num_workers} processes that read images: {error}; set it"
                " lower, or to 0"
            ) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "data.workers: a process that reads images was ended, as the system does for want of memory;"
                f" set it lower than {self._num_workers}, or to 0"
            ) from None

    def _in_workers(
        self, reader: "_ChunkReader", chunks: Iterator[list[int]]
    ) -> Generator[_Chunk | str, None, None]:
        from torch.utils.data import DataLoader

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of more workers than CPUs: as it was asked for
            loader: DataLoader[Any] = DataLoader(
                reader,  # type: ignore[arg-type]  # a data set without a length
                sampler=chunks,
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=self._num_workers,
                worker_init_fn=_leave_signals,
                # the global one is the caller's: which numbers it gives must not depend on workers
                generator=torch.Generator().manual_seed(0),
            )
        iterator: Any = iter(loader)
        try:
            yield from iterator
        finally:  # not when nothing refers to it any more: the traceback of an error does
            iterator._shutdown_workers()


class _Relabelled:
    """Reads inputs and gives them another label."""

    def __init__(self, read: Callable[[int], Sample], new_labels: Tensor) -> None:
        self._read, self._new_labels = read, new_labels.tolist()

    def __call__(self, number: int) -> Sample:
        found, label = self._read(number)
        return found, self._new_labels[label]


def default_workers() -> int:
    """As many as there are CPUs for this process; with one CPU the process reads by itself.

    The processes that torchrun started on one machine share its CPUs.
    """
    num_processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    count = usable_cpus().count // max(1, int(num_processes) if num_processes.isdecimal() else 1)
    return count if count > 1 else 0


class _ChunkReader:
    """Reads a few inputs at once: what workers have of the split."""

    def __init__(self, read: Callable[[int], Sample], first: npt.NDArray[Any], name: str) -> None:
        self._read, self._first, self._name = read, first, name

    def __getitem__(self, numbers: list[int]) -> _Chunk | str:
        """Inputs and labels, or what is wrong with one of them."""
        try:
            with bombs_refused():
                inputs, labels = zip(*map(self._read, numbers), strict=True)
            check_alike(self._first, inputs, numbers, self._name)
        except DataError as error:
            return str(error)
        return np.stack(inputs), np.array(labels, np.int64)


def check_alike(
    first: npt.NDArray[Any], inputs: Iterable[npt.NDArray[Any]], numbers: Iterable[int], name: str = ""
) -> None:
    """Raise DataError where inputs differ from the first one of all in shape or type, by their numbers."""
    for number, found in zip(numbers, inputs, strict=True):
        if found.shape != first.shape or found.dtype != first.dtype:
            fix = "data.image_size resizes PIL images" if found.dtype == first.dtype else "convert them"
            raise DataError(
                f"{name and f'data {name}: '}inputs 0 and {number:,} differ: {first.dtype} {first.shape} and"
                f" {found.dtype} {found.shape}; all need one shape and type: {fix}"
            )


def _in_this_process(
    reader: _ChunkReader, chunks: Iterator[list[int]]
) -> Generator[_Chunk | str, None, None]:
    for numbers in chunks:
        yield reader[numbers]


def _unchanged(chunk: object) -> object:
    return chunk


def _leave_signals(_: int) -> None:
    """Leave Ctrl-C, which comes to all processes of a terminal, to the one that started the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
