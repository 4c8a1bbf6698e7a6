"""An array of Zarr, version 2 or 3, as TensorStore writes them for Orbax: a small JSON, and chunks by key.

Read are the codecs that Orbax uses: zstd or none, and shards (a chunk of chunks with an index at its end or
start). A chunk that is missing consists of the fill value. Reference: zarr-specs.readthedocs.io.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch

from bncli.batchnorm.bits import as_bytes
from bncli.checkpoints.byte_source import MAX_READ, UnreadableFileError
from bncli.checkpoints.formats.crc32c import crc32c
from bncli.checkpoints.formats.jax_tree import DTYPES
from bncli.checkpoints.formats.safetensors_file import parse_json
from bncli.checkpoints.formats.zstandard_frame import decompress
from bncli.checkpoints.stored_tensor import Storage, StoredTensor, contiguous_stride, stored_tensor

VERSION_2, VERSION_3 = ".zarray", "zarr.json"
MAX_CHUNKS = 100_000
MAX_AXES = 32  # NumPy's own limit was that for long
_MISSING = 2**64 - 1  # in the index of a shard
_TYPES = {
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
    "<i2": torch.int16,
    "<i4": torch.int32,
    "<i8": torch.int64,
    "<u2": torch.uint16,
    "<u4": torch.uint32,
    "<u8": torch.uint64,
    "|b1": torch.bool,
    "|i1": torch.int8,
    "|u1": torch.uint8,
    **DTYPES,
}
# the bytes of a chunk by its key; None where it is missing; never more than so many
ReadChunk = Callable[[str, int], bytes | None]


@dataclass(frozen=True)
class _Layout:
    """How an array, or a shard of one, is divided and stored."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: torch.dtype
    fill: object
    order: str = "C"  # or F: the numbers of a chunk lie column by column
    compression: str | None = None
    shards: "_Layout | None" = None  # how a chunk is divided again
    index_at_end: bool = True
    index_has_checksum: bool = True
    separator: str = "."
    prefix: str = ""

    @property
    def size(self) -> int:
        """Bytes of a chunk."""
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(-(-length // chunk) for length, chunk in zip(self.shape, self.chunks, strict=True))


def zarr_tensor(name: str, description: bytes, read: ReadChunk) -> StoredTensor | None:
    """An array by the content of its `.zarray` or `zarr.json`; None for a type that bncli does not read.

    Raises:
        UnreadableFileError: on damage. What is not understood of the chunks is told when they are read.
    """
    content = parse_json(description)
    layout = _version_3(content) if content.get("zarr_format") == 3 else _version_2(content)
    if layout is None:
        return None
    size = math.prod(layout.shape) * layout.dtype.itemsize

    @lru_cache(maxsize=1)
    def numbers() -> bytes:
        return _read(layout, read, name).tobytes()

    storage = Storage(size, lambda start, count: numbers()[start : start + count], name)
    return stored_tensor(storage, layout.dtype, 0, layout.shape, contiguous_stride(layout.shape))


def _version_2(content: Mapping[str, Any]) -> _Layout | None:
    compressor = content.get("compressor")
    kind = compressor.get("id") if isinstance(compressor, dict) else None
    dtype = content.get("dtype")
    if content.get("filters"):
        kind = "filters"
    return _layout(
        content.get("shape"),
        content.get("chunks"),
        _TYPES.get(dtype) if isinstance(dtype, str) else None,
        content.get("fill_value"),
        order=content.get("order", "C"),
        compression=None if kind is None else str(kind),
        separator=content.get("dimension_separator", "."),
    )


def _version_3(content: Mapping[str, Any]) -> _Layout | None:
    dtype, keys = content.get("data_type"), _of(content, "chunk_key_encoding")
    is_old = keys.get("name") == "v2"
    found = _layout(
        content.get("shape"),
        _configuration(_of(content, "chunk_grid")).get("chunk_shape"),
        _TYPES.get(dtype) if isinstance(dtype, str) else None,
        content.get("fill_value"),
        separator=_configuration(keys).get("separator", "." if is_old else "/"),
    )
    if found is None:
        return None
    return replace(_with_codecs(found, content.get("codecs"), 0), prefix="" if is_old else "c")


def _with_codecs(layout: _Layout, codecs: object, depth: int) -> _Layout:
    """With what is done to a chunk on its way to the file."""
    for codec in codecs if isinstance(codecs, list) else ():
        name, known = str(_of({"codec": codec}, "codec").get("name")), _configuration(codec)
        if name == "bytes" and known.get("endian", "little") == "little":
            continue
        if name == "crc32c":
            layout = replace(layout, compression="crc32c")
        elif name == "sharding_indexed" and depth == 0:
            inner = _layout(layout.chunks, known.get("chunk_shape"), layout.dtype, layout.fill)
            index = known.get("index_codecs")
            names = (
                [_of({"codec": one}, "codec").get("name") for one in index] if isinstance(index, list) else []
            )
            if inner is None:
                raise UnreadableFileError("a damaged array: shards without a shape")
            layout = replace(
                layout,
                shards=_with_codecs(inner, known.get("codecs"), depth + 1),
                index_at_end=known.get("index_location", "end") == "end",
                index_has_checksum="crc32c" in names,
            )
        else:
            layout = replace(layout, compression=name if layout.compression is None else "several codecs")
    return layout


def _layout(
    shape: object,
    chunks: object,
    dtype: torch.dtype | None,
    fill: object,
    order: object = "C",
    compression: str | None = None,
    separator: object = ".",
) -> _Layout | None:
    lengths, parts = _lengths(shape, 0), _lengths(chunks, 1)
    if len(lengths) != len(parts) or order not in ("C", "F") or separator not in (".", "/"):
        raise UnreadableFileError("a damaged array: its shape and that of its chunks do not fit")
    if dtype is None:
        return None
    return _Layout(lengths, parts, dtype, fill, str(order), compression, separator=str(separator))


def _lengths(value: object, least: int) -> tuple[int, ...]:
    parts: list[Any] = list(value) if isinstance(value, list | tuple) else [None]
    if len(parts) > MAX_AXES or not all(type(part) is int and least <= part < 2**48 for part in parts):
        raise UnreadableFileError("a damaged array: it has no proper shape")
    return tuple(parts)


def _of(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key)
    return found if isinstance(found, dict) else {"name": found}


def _configuration(content: object) -> Mapping[str, Any]:
    return _of(content, "configuration") if isinstance(content, dict) else {}


# ---- numbers


def _read(layout: _Layout, read: ReadChunk, name: str) -> "np.ndarray[Any, Any]":
    """All of an array, as runs of bytes of the size of a number."""

    def chunk(position: tuple[int, ...]) -> "np.ndarray[Any, Any] | None":
        key = layout.separator.join((*((layout.prefix,) if layout.prefix else ()), *map(str, position)))
        # compressed data are hardly larger than what they hold, and a shard has an index
        data = read(key if key else "0", 2 * layout.size + 20 * _num_inner(layout) + 1024)
        return None if data is None else _chunk(layout, data, name)

    return _assemble(layout, chunk)


def _num_inner(layout: _Layout) -> int:
    return math.prod(layout.shards.grid) if layout.shards else 0


def _assemble(
    layout: _Layout, chunk: Callable[[tuple[int, ...]], "np.ndarray[Any, Any] | None"]
) -> "np.ndarray[Any, Any]":
    size = layout.dtype.itemsize
    if max(math.prod(layout.shape) * size, layout.size) > MAX_READ or math.prod(layout.grid) > MAX_CHUNKS:
        raise UnreadableFileError(f"an array of shape {layout.shape} is too large to be read here")
    fill = np.frombuffer(_fill(layout), dtype=f"V{size}")
    whole = np.full(layout.shape, fill[0], dtype=f"V{size}")
    for position in _positions(layout.grid):
        part = chunk(position)
        if part is None:
            continue
        starts = [index * length for index, length in zip(position, layout.chunks, strict=True)]
        ends = [
            min(start + length, end)
            for start, length, end in zip(starts, layout.chunks, layout.shape, strict=True)
        ]
        place = tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))
        whole[place] = part[tuple(slice(0, end - start) for start, end in zip(starts, ends, strict=True))]
    return whole


def _positions(grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return product(*(range(count) for count in grid))


def _chunk(layout: _Layout, data: bytes, name: str) -> "np.ndarray[Any, Any]":
    """The numbers of one chunk, of the shape of chunks."""
    if layout.shards is not None and layout.compression is None:
        return _shard(layout, layout.shards, data, name)
    if layout.compression == "zstd":
        data = decompress(data, layout.size)
    elif layout.compression is not None:
        raise UnreadableFileError(
            f"its array {name[:100]} is stored with {layout.compression}, not with zstd"
        )
    if len(data) != layout.size:
        raise UnreadableFileError(f"a damaged or truncated array: {name[:100]}")
    return np.frombuffer(data, dtype=f"V{layout.dtype.itemsize}").reshape(
        layout.chunks, order="F" if layout.order == "F" else "C"
    )


def _shard(layout: _Layout, inner: _Layout, data: bytes, name: str) -> "np.ndarray[Any, Any]":
    """A chunk that is divided again, with an index of where each part lies and how long it is."""
    count = math.prod(inner.grid)
    size = 16 * count + (4 if layout.index_has_checksum else 0)
    if count > MAX_CHUNKS or size > len(data):
        raise UnreadableFileError(f"a damaged or truncated array: {name[:100]}")
    index = data[-size:] if layout.index_at_end else data[:size]
    entries = index[: 16 * count]
    if layout.index_has_checksum and crc32c(entries) != int.from_bytes(index[-4:], "little"):
        raise UnreadableFileError(f"a damaged array: the index of {name[:100]} does not fit its checksum")
    places = np.frombuffer(entries, dtype="<u8").reshape((*inner.grid, 2))

    def part(position: tuple[int, ...]) -> "np.ndarray[Any, Any] | None":
        start, length = (int(value) for value in places[position])
        if (start, length) == (_MISSING, _MISSING):
            return None
        if start + length > len(data):
            raise UnreadableFileError(f"a damaged or truncated array: {name[:100]}")
        return _chunk(inner, data[start : start + length], name)

    return _assemble(inner, part)


def _fill(layout: _Layout) -> bytes:
    """The bytes of the number that missing chunks consist of."""
    value = 0 if layout.fill is None else layout.fill
    if isinstance(value, str):
        value = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(value)
    try:
        return as_bytes(torch.tensor([value], dtype=layout.dtype)).numpy().tobytes()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UnreadableFileError("a damaged array: its fill value is none") from None
