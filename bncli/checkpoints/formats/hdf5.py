"""HDF5, read by pyfive: a library without C code, which a hostile file can make raise but not crash.

What a file claims is bounded here: how often and how much is read, and how large an array may be. Links to
other files are not followed, as pyfive knows none.
"""

import importlib.util
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from bncli.checkpoints.byte_source import MAX_READ, ByteSource, ForeignFileError, UnreadableFileError
from bncli.checkpoints.stored_tensor import Storage, StoredTensor, contiguous_stride, stored_tensor

PAGE = 2**16  # bytes that are read at once: what describes an array lies near what describes the next
MAX_PAGES = 256
MIN_READS = 20_000  # that any file may ask for, however small; a sound one asks once for 40 bytes or more
MAX_DEPTH = 40
_POINTER = 16  # bytes of an entry that lies elsewhere in the file

_DTYPES = {
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
    "<i4": torch.int32,
    "<i8": torch.int64,
    "|V2": torch.bfloat16,  # how h5py stores the type of ml_dtypes; nothing else has two opaque bytes
}


@contextmanager
def errors_of_hdf5() -> Iterator[None]:
    """Turn whatever pyfive raises on a damaged file into one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about types that are not read
            yield
    except UnreadableFileError:
        raise
    except NotImplementedError as error:
        raise ForeignFileError(
            f"an HDF5 file that is written in a way that bncli does not read: {_text(error)}"
        ) from None
    except AssertionError:  # pyfive's, without words, of what it does not know
        raise UnreadableFileError(
            "a damaged HDF5 file, or one that points to other files, which bncli does not follow"
        ) from None
    except (Exception, RecursionError) as error:
        raise UnreadableFileError(f"a damaged or truncated HDF5 file: {_text(error)}") from None


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


class Hdf5File:
    """The groups, attributes and arrays of a file, by path."""

    def __init__(self, source: ByteSource, start: int = 0, size: int | None = None) -> None:
        """`start` and `size` say where in the source it lies: Keras puts it into a zip archive.

        Raises:
            UnreadableFileError: when it is no HDF5 file, or pyfive is not installed.
        """
        if importlib.util.find_spec("pyfive") is None:
            raise ForeignFileError('an HDF5 file; to read it: pip install "bncli[keras]"')
        self._source, self._start = source, start
        self._size = source.size - start if size is None else size
        with errors_of_hdf5():
            self._file = _guarded_file(_Pages(source, start, self._size))

    def attributes(self, node: Any = None) -> dict[str, Any]:
        """The attributes of a node of `paths()`, or of the top; text as str, lists of text as lists of str.

        By the node, not by its path: pyfive would read all groups on the way once more.
        """
        with errors_of_hdf5():
            found = (self._file if node is None else node).attrs
            return {str(name): _plain(value) for name, value in found.items()}

    def paths(self) -> list[tuple[str, Any]]:
        """Every group and array below the top with its path, depth first, in the file's order."""
        with errors_of_hdf5():
            return list(self._below(self._file, "", set(), 0))

    def _below(self, group: Any, path: str, above: set[int], depth: int) -> Iterator[tuple[str, Any]]:
        key = id(group._dataobjects)  # one object a place in the file
        if key in above or depth > MAX_DEPTH:
            return  # a group inside itself
        for name in group:
            node, place = group.get_lazy_view(name), f"{path}/{name}" if path else name
            if node is None:
                continue
            yield place, node
            if hasattr(node, "keys"):
                yield from self._below(node, place, above | {key}, depth + 1)

    def tensor(self, node: Any) -> StoredTensor | None:
        """An array as a tensor in the file; None for what is no array of numbers that bncli reads.

        Raises:
            UnreadableFileError: on damage, and on an array that reaches beyond the file.
        """
        with errors_of_hdf5():
            dtype = _DTYPES.get(getattr(node.dtype, "str", ""))
            if dtype is None or node.shape is None:
                return None
            shape = tuple(int(length) for length in node.shape)
            size = math.prod(shape) * dtype.itemsize
            if node.id.layout_class == 1:  # one run of bytes
                offset = node.id.data_offset
                if not 0 <= offset <= self._size - size:
                    raise UnreadableFileError("a damaged or truncated file: an array lies beyond its end")
                start = self._start + self._file.userblock_size + offset
                storage = Storage(
                    size, lambda position, count: self._source.read_at(start + position, count), node.name
                )
            else:
                chunk = math.prod(node.chunks or ()) * dtype.itemsize
                if max(size, chunk) > MAX_READ:
                    return None  # in pieces or compressed: far larger than any of BatchNorm
                storage = Storage(size, lambda start, count: _content(node)[start : start + count], node.name)
        return stored_tensor(storage, dtype, 0, shape, contiguous_stride(shape))


@lru_cache(maxsize=8)
def _content(node: Any) -> bytes:
    with errors_of_hdf5():
        return bytes(node[()].tobytes())


def _guarded_file(stream: "_Pages") -> Any:
    from pyfive import File

    class Guarded(File):  # type: ignore[misc]
        """pyfive makes room for as many texts as an attribute claims; here no more than it has bytes for."""

        def _get_dataobjects(self, address: int) -> Any:
            found = super()._get_dataobjects(address)
            read = found._attr_value

            def guarded(kind: Any, buffer: Any, count: int, offset: int) -> Any:
                smallest = min(_POINTER, getattr(kind.dtype, "itemsize", 1) or 1)
                if count * smallest > len(buffer):
                    raise UnreadableFileError("a damaged file: an attribute is larger than its place")
                return read(kind, buffer, count, offset)

            found._attr_value = guarded
            return found

    return Guarded(stream)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list) else value


class _Pages(io.RawIOBase):
    """A part of a source for many small reads; the pages read last are kept."""

    def __init__(self, source: ByteSource, start: int, size: int) -> None:
        super().__init__()
        self._size, self._position = size, 0
        self._reads_left = MIN_READS + size // 8

        def page(number: int) -> bytes:
            first = number * PAGE
            return source.read_at(start + first, min(PAGE, size - first))

        self._page = lru_cache(maxsize=MAX_PAGES)(page)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if not 0 <= base + offset <= self._size:
            raise UnreadableFileError("a damaged or truncated file: it points beyond its end")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise UnreadableFileError("a damaged file: it leads in a circle")
        left = self._size - self._position
        size = left if size is None or size < 0 else min(size, left)
        if size > MAX_READ:
            raise UnreadableFileError(f"it wants {size:,} bytes read at once; bncli stops at {MAX_READ:,}")
        parts, missing = [], size
        while missing:
            number, inside = divmod(self._position, PAGE)
            part = self._page(number)[inside : inside + missing]
            parts.append(part)
            self._position += len(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
