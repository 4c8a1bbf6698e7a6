"""A file of torch.save that bncli wrote itself, read whole: every byte checked, every tensor in memory.

It goes through the reader of everybody's files, which executes nothing, and is asked for more: every entry's
CRC-32, no compression, every storage of the size that is said, and nothing but plain values and tensors.
Sizes are compared with the bytes that are there before anything is allocated, so what is read is never larger
than the file. `torch.load(weights_only=True)` executes no foreign code either, but it trusts numbers: a file
of 500 bytes may have it allocate terabytes.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bncli.checkpoints.any_content import named, open_file, read_content, without_collector
from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.formats.inert_pickle import Global, Inert
from bncli.checkpoints.formats.torch_zip import SIGNATURE, read_torch_zip
from bncli.checkpoints.stored_tensor import Storage, StoredTensor

MAX_DEPTH = 64
MAX_VALUES = 2_000_000  # a list that holds ten lists that each hold ten ... is a small file, too


@contextmanager
def open_whole(path: str | Path) -> Iterator[tuple[str, object]]:
    """The kind of a file and its content, with `StoredTensor` for tensors until `load_values` reads them.

    Raises:
        CheckpointError: naming the file and what is wrong with it, also for what is raised while it is open.
    """
    source = str(path)
    with ExitStack() as stack, named(source), without_collector():
        file = open_file(source, stack)
        if file.size >= len(SIGNATURE) and file.read_at(0, len(SIGNATURE)) == SIGNATURE:
            yield read_torch_zip(file, strictly=True)
        else:
            yield read_content(file, stack)


def load_values(content: object) -> Any:
    """The same containers, plain values and tensors, all in memory, on the CPU; views share their storage.

    Raises:
        UnreadableFileError: on anything else in it, on damage, and on endless nesting.
    """
    _check_extent(content)
    return _Loader().load(content)


class _Loader:
    """Loads each storage once."""

    def __init__(self) -> None:
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def load(self, value: object) -> object:
        if isinstance(value, StoredTensor):
            return self._tensor(value)
        kind = type(value)
        if kind is dict or kind is OrderedDict:
            return kind((key, self.load(item)) for key, item in value.items())  # type: ignore[attr-defined]
        if kind is list or kind is tuple:
            return kind(self.load(item) for item in value)  # type: ignore[attr-defined]
        if value is None or kind in (str, int, float, bool):
            return value
        raise UnreadableFileError(
            f"it holds Python objects beside tensors ({_name(value)}), which bncli does not execute;"
            " save model.state_dict() instead"
        )

    def _tensor(self, stored: StoredTensor) -> Tensor:
        num_there = stored.storage.size // stored.dtype.itemsize
        # strides may repeat one value 2^40 times, so the shape counts; channels_last passes
        if stored.num_elements > num_there:
            raise UnreadableFileError(
                f"a damaged file: a tensor of shape {stored.shape} does not fit its storage of"
                f" {num_there} values"
            )
        flat = self._flat(stored.storage, stored.dtype)
        try:
            return flat.as_strided(stored.shape, stored.stride, stored.offset)
        except RuntimeError:  # of a tensor without elements, stride and offset may be anything
            raise UnreadableFileError(f"a damaged file: a tensor of shape {stored.shape}") from None

    def _flat(self, storage: Storage, dtype: torch.dtype) -> Tensor:
        found = self._storages.get((storage.name, dtype))
        if found is None:
            data = storage.read_whole()
            found = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self._storages[storage.name, dtype] = found
        return found


def _check_extent(content: object) -> None:
    """Refuse deep, huge and endless nesting: all that follows may recurse."""
    level, num_values = [content], 0
    for _ in range(MAX_DEPTH):
        num_values += len(level)
        below: list[object] = []
        for node in level:
            if isinstance(node, dict):
                below += node.keys()
                below += node.values()
            elif type(node) in (list, tuple):
                below += node  # type: ignore[arg-type]
            if num_values + len(below) > MAX_VALUES:
                raise UnreadableFileError(f"a damaged file: more than {MAX_VALUES:,} values")
        if not below:
            return
        level = below
    raise UnreadableFileError(f"a damaged file: nested deeper than {MAX_DEPTH} levels")


def _name(value: object) -> str:
    """What a pickle calls a thing that is no plain value."""
    known = value.kind if isinstance(value, Inert) else value
    return known.path[:100] if isinstance(known, Global) else "without a name"
