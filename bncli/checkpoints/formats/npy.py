"""Arrays of NumPy (.npy): a header with type and shape in Python's notation, then the numbers.

Reference: numpy/lib/format.py.
"""

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.stored_tensor import Storage, StoredTensor, contiguous_stride, stored_tensor

SIGNATURE = b"\x93NUMPY"
OBJECTS, OTHERS = "|O0", "|?0"  # the kinds of pickled objects, and of what no network has
MAX_HEADER = 10_000  # bytes, as NumPy allows
_TYPICAL = 256  # bytes in which most headers end
TYPES = {
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
    "<V2": torch.bfloat16,  # how NumPy writes the type of ml_dtypes; nothing else has two opaque bytes
    "|V2": torch.bfloat16,
    "|b1": torch.bool,
    "|i1": torch.int8,
    "|u1": torch.uint8,
    "<i2": torch.int16,
    "<i4": torch.int32,
    "<i8": torch.int64,
    "<u2": torch.uint16,
    "<u4": torch.uint32,
    "<u8": torch.uint64,
    "<c8": torch.complex64,
    "<c16": torch.complex128,
}


@dataclass(frozen=True, slots=True)
class Header:
    """What is said of the numbers that follow."""

    kind: str  # as NumPy writes a type, `<f4`; or OBJECTS, or OTHERS
    shape: tuple[int, ...]
    by_column: bool
    length: int  # bytes of the header, after which the numbers begin

    @property
    def size(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * int(self.kind[2:])


def read_header(read: Callable[[int, int], bytes], size: int) -> Header:
    """The header of an array that may take `size` bytes; `read(start, count)` is relative to its start.

    Raises:
        UnreadableFileError: on damage, and where the numbers reach beyond the size.
    """
    start = read(0, min(size, _TYPICAL))
    if not start.startswith(SIGNATURE) or len(start) < 12 or start[6] not in (1, 2, 3):
        raise UnreadableFileError("a damaged or truncated array of NumPy")
    begin = 10 if start[6] == 1 else 12
    length = begin + int.from_bytes(start[8:begin], "little")
    if length > min(MAX_HEADER, size):
        raise UnreadableFileError("a damaged or truncated array of NumPy")
    text = start[begin:length] if length <= len(start) else read(begin, length - begin)
    try:
        said = ast.literal_eval(text.decode("utf-8").strip())
        kind, shape, by_column = said["descr"], said["shape"], said["fortran_order"]
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
        raise UnreadableFileError("a damaged array of NumPy: its header is none") from None
    if (
        not isinstance(shape, tuple)
        or len(shape) > 64
        or not all(type(length) is int and 0 <= length < 2**48 for length in shape)
    ):
        raise UnreadableFileError("a damaged array of NumPy: it has no proper shape")
    if not isinstance(kind, str) or not kind[2:].isdecimal() or len(kind) > 12:
        kind = OBJECTS if kind == "|O" else OTHERS
    found = Header(kind, shape, by_column is True, length)
    if found.size > size - length:
        raise UnreadableFileError("a damaged or truncated array of NumPy: numbers are missing")
    return found


def array_tensor(header: Header, storage: Storage) -> StoredTensor | None:
    """The numbers as a tensor; `storage` begins with them. None for a type that bncli does not read."""
    dtype = TYPES.get(header.kind)
    if dtype is None:
        return None
    stride = contiguous_stride(header.shape)
    if header.by_column:
        stride = tuple(reversed(contiguous_stride(header.shape[::-1])))
    return stored_tensor(storage, dtype, 0, header.shape, stride)
