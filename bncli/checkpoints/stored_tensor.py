"""A tensor that lies in a file and is read when asked for.

The claims of the file (shape, stride, offset, type) are checked against the bytes that are there before
anything is allocated.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bncli.batchnorm.bits import as_bytes
from bncli.checkpoints.byte_source import MAX_READ, UnreadableFileError

MAX_DIMENSIONS = 64  # PyTorch's own limit
CHUNK = 16 * 2**20  # bytes
PIECE = 2**20  # bytes: small enough to be in the processor's cache still when its checksum is computed


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes in a file that tensors are views of; `read(start, size)` is relative to it."""

    size: int  # bytes
    read: Callable[[int, int], bytes]
    name: str = ""  # the same for the same bytes of one file; '' where nothing tells
    check: Callable[[int], None] | None = None  # raises where the CRC-32 of all of it is another
    position: Callable[[], int] | None = None  # of its first byte in the file; None where it is compressed

    def read_whole(self) -> bytearray:
        """All of it, in memory that is nobody else's; however large it is, never more than its size.

        Raises:
            UnreadableFileError: on damage.
        """
        data = bytearray(self.size)
        self.read_into(data, 0)
        return data

    def read_into(self, target: bytearray | memoryview, start: int) -> None:
        """The bytes from `start` on, as many as the target has; all of them are checked against the CRC-32.

        Raises:
            UnreadableFileError: on damage.
        """
        view, checksum = memoryview(target), 0
        for position in range(0, len(view), PIECE):
            piece = self.read(start + position, min(PIECE, len(view) - position))
            checksum = zlib.crc32(piece, checksum)
            view[position : position + len(piece)] = piece
        if self.check is not None and len(view) == self.size:
            self.check(checksum)


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor in a file: its shape and type are known, its numbers are read on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: Storage
    offset: int  # elements
    stride: tuple[int, ...]  # elements

    def read(self) -> Tensor:
        """A CPU copy, contiguous; only the bytes between its first and last element are read.

        Raises:
            UnreadableFileError: on damage, and on a tensor that is far larger than any of BatchNorm.
        """
        size = self.dtype.itemsize
        if self.num_elements == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        span = self.span
        if max(span, self.num_elements) * size > MAX_READ:
            raise UnreadableFileError(f"a tensor of shape {self.shape} is too large to be read here")
        data = bytearray(self.storage.read(self.offset * size, span * size))
        tensor = torch.frombuffer(data, dtype=self.dtype)
        if self.num_elements == span and len(self.shape) <= 1:
            return tensor.reshape(self.shape)
        return tensor.as_strided(self.shape, self.stride).clone(memory_format=torch.contiguous_format)

    def copy_into(self, destination: Tensor) -> None:
        """Put the numbers into a CPU tensor of this shape, whatever its type and layout.

        Where both lie row by row in one type, they go straight there; otherwise over memory for this tensor.
        The checksum of the storage is compared where all of it is read and the file has one.

        Raises:
            UnreadableFileError: on damage.
        """
        if self.num_elements == 0:
            return
        size, span = self.dtype.itemsize, self.span
        is_direct = (
            self.dtype == destination.dtype and self.is_contiguous and destination.is_contiguous()
        )  # fmt: skip
        target = destination if is_direct else torch.empty(span, dtype=self.dtype)
        self.storage.read_into(as_bytes(target).numpy().data, self.offset * size)
        if not is_direct:
            destination.copy_(target.as_strided(self.shape, self.stride).reshape(destination.shape))

    def chunks(self) -> Iterator[bytes]:
        """The numbers as bytes, row by row, `CHUNK` at a time: a tensor of any size in little memory.

        Raises:
            UnreadableFileError: on damage, and on a very large tensor that lies otherwise.
        """
        start, size = self.offset * self.dtype.itemsize, self.num_elements * self.dtype.itemsize
        if self.is_contiguous:
            for position in range(0, size, CHUNK):
                yield self.storage.read(start + position, min(CHUNK, size - position))
        else:
            data = as_bytes(self.read()).numpy()
            for position in range(0, size, CHUNK):
                yield data[position : position + CHUNK].tobytes()

    @property
    def num_elements(self) -> int:
        """As `Tensor.numel()`."""
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included, of a tensor that is not empty."""
        return 1 + sum((length - 1) * step for length, step in zip(self.shape, self.stride, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after another, row by row."""
        strides = zip(self.shape, self.stride, contiguous_stride(self.shape), strict=True)
        return all(length == 1 or stride == expected for length, stride, expected in strides)


def stored_tensor(
    storage: Storage, dtype: torch.dtype, offset: object, shape: object, stride: object
) -> StoredTensor:
    """A checked view of a storage.

    Raises:
        UnreadableFileError: when the view is malformed or reaches beyond the storage.
    """
    if not (_are_sizes(shape) and _are_sizes(stride) and _is_size(offset)) or len(shape) != len(stride):  # type: ignore[arg-type]
        raise UnreadableFileError(
            "a damaged file: a tensor without a proper shape, stride and offset (none may be negative)"
        )
    tensor = StoredTensor(tuple(shape), dtype, storage, offset, tuple(stride))  # type: ignore[arg-type]
    if tensor.num_elements:
        end = tensor.offset + tensor.span
        if end * dtype.itemsize > storage.size:
            raise UnreadableFileError(
                f"a damaged or truncated file: a tensor of shape {tensor.shape} reaches beyond its storage"
                f" of {storage.size:,} bytes"
            )
    return tensor


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stride of a tensor whose elements lie one after another."""
    return tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _are_sizes(values: object) -> bool:
    return isinstance(values, tuple) and len(values) <= MAX_DIMENSIONS and all(map(_is_size, values))
