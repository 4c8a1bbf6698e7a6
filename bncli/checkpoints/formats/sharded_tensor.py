"""One tensor that lies in several pieces, as processes shared it out: read as if it lay in one.

A piece is a block of the whole, cut along any of its dimensions. Only the pieces, and of them only the rows,
that a read asks for are read.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from bncli.batchnorm.bits import as_bytes
from bncli.checkpoints.byte_source import MAX_READ, UnreadableFileError
from bncli.checkpoints.stored_tensor import (
    MAX_DIMENSIONS,
    Storage,
    StoredTensor,
    contiguous_stride,
    stored_tensor,
)


class Chunk(NamedTuple):
    """A block of a tensor."""

    offsets: tuple[int, ...]  # of its first element in the whole
    sizes: tuple[int, ...]
    name: str  # of the file that it lies in, and where
    open: Callable[[], StoredTensor]  # of the shape `sizes`; called whenever some of it is read


def join(shape: tuple[int, ...], dtype: torch.dtype, chunks: Sequence[Chunk]) -> StoredTensor:
    """The whole tensor, of which nothing is read yet.

    Raises:
        UnreadableFileError: where the chunks are not as large as the whole, or one reaches beyond it.
    """
    own: dict[tuple[int, ...], Chunk] = {}
    for chunk in chunks:  # ranks that hold the same one may each be told of
        if math.prod(chunk.sizes):
            own.setdefault(chunk.offsets, chunk)
    fits = len(shape) <= MAX_DIMENSIONS and all(
        len(chunk.offsets) == len(chunk.sizes) == len(shape)
        and all(
            offset + size <= length
            for offset, size, length in zip(chunk.offsets, chunk.sizes, shape, strict=True)
        )
        for chunk in own.values()
    )
    if not fits or sum(math.prod(chunk.sizes) for chunk in own.values()) != math.prod(shape):
        raise UnreadableFileError(
            f"a damaged file: the pieces of a tensor of shape {shape} do not make it up"
        )
    found = tuple(own.values())
    read = partial(_read_whole, dtype) if len(found) == 1 else partial(_read_parts, shape, dtype)
    storage = Storage(
        math.prod(shape) * dtype.itemsize,
        lambda start, size: read(found, start, size),
        " ".join(chunk.name for chunk in found),
    )
    return stored_tensor(storage, dtype, 0, shape, contiguous_stride(shape))


def _read_whole(dtype: torch.dtype, chunks: Sequence[Chunk], start: int, size: int) -> bytes:
    return _bytes_of(_opened(chunks[0], dtype), start, size)


def _read_parts(
    shape: tuple[int, ...], dtype: torch.dtype, chunks: Sequence[Chunk], start: int, size: int
) -> bytes:
    """Bytes of the whole: the rows (along its first dimension) that they lie in, put together."""
    row = math.prod(shape[1:]) * dtype.itemsize
    first, last = start // row, -(-(start + size) // row)
    if (last - first) * row > 2 * MAX_READ:
        raise UnreadableFileError(f"a tensor of shape {shape} in pieces is too large to be put together here")
    rows = np.empty((last - first, *shape[1:], dtype.itemsize), np.uint8)
    missing = np.ones(rows.shape[:-1], bool)
    for chunk in chunks:
        begin, end = max(first, chunk.offsets[0]), min(last, chunk.offsets[0] + chunk.sizes[0])
        if begin >= end:
            continue
        own_row = math.prod(chunk.sizes[1:]) * dtype.itemsize
        data = _bytes_of(_opened(chunk, dtype), (begin - chunk.offsets[0]) * own_row, (end - begin) * own_row)
        place = (
            slice(begin - first, end - first),
            *(
                slice(offset, offset + length)
                for offset, length in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
            ),
        )
        block = np.frombuffer(data, np.uint8)
        rows[place] = block.reshape(end - begin, *chunk.sizes[1:], dtype.itemsize)
        missing[place] = False
    if missing.any():
        raise UnreadableFileError(f"a damaged file: pieces of a tensor of shape {shape} overlap")
    return rows.reshape(-1)[start - first * row :][:size].tobytes()


def _opened(chunk: Chunk, dtype: torch.dtype) -> StoredTensor:
    tensor = chunk.open()
    if (tensor.shape, tensor.dtype) != (chunk.sizes, dtype):
        raise UnreadableFileError(
            "a damaged file: a piece of a tensor has another shape or type than is said"
        )
    return tensor


def _bytes_of(tensor: StoredTensor, start: int, size: int) -> bytes:
    if tensor.is_contiguous:
        return tensor.storage.read(tensor.offset * tensor.dtype.itemsize + start, size)
    return as_bytes(tensor.read()).numpy()[start : start + size].tobytes()
