"""The tensors of a TensorFlow checkpoint: a sorted table of LevelDB (`.index`), and their bytes (`.data-*`).

The table's last 48 bytes say where the index of its blocks lies. Each entry is a tensor's key with a
BundleEntryProto: type, shape, which `.data` file, offset and size. A variable that was divided among several
machines has a list of its slices instead, and each slice an entry of its own under a key that begins with a
zero byte. Reference: TensorFlow's core/util/tensor_bundle and core/lib/io/table_format.txt.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch

from bncli.checkpoints.byte_source import MAX_READ, ByteSource, ForeignFileError, UnreadableFileError
from bncli.checkpoints.formats.crc32c import crc32c
from bncli.checkpoints.formats.protobuf import fields, varint
from bncli.checkpoints.formats.sharded_tensor import Chunk, join
from bncli.checkpoints.stored_tensor import Storage, StoredTensor, contiguous_stride, stored_tensor

MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER = 48  # bytes
MAX_KEYS = 64 * 2**20  # bytes of all keys together: each may repeat the beginning of the one before
MAX_ENTRIES = 300_000
MAX_SHARDS = 100_000
MAX_CHECKED = 2**15  # bytes of an array whose checksum is computed: 3 ms, and most of BatchNorm are smaller
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
STRING = 7
DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    5: torch.int16,
    6: torch.int8,
    8: torch.complex64,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    17: torch.uint16,
    19: torch.float16,
    22: torch.uint32,
    23: torch.uint64,
}
_DAMAGED = "a damaged or truncated index of a TensorFlow checkpoint"


class Slice(NamedTuple):
    """A block of a variable, by dimension."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]  # -1: all of the dimension

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the block, in a variable of such a shape."""
        return tuple(
            whole if length < 0 else length for whole, length in zip(shape, self.lengths, strict=True)
        )


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int  # masked CRC-32C of the numbers
    slices: tuple[Slice, ...]  # of a variable that is divided; empty for all others


class Bundle:
    """The tensors of a checkpoint by key; a `.data` file is opened when one of its tensors is read."""

    def __init__(self, index: ByteSource, open_shard: Callable[[str], ByteSource]) -> None:
        """`open_shard` opens a file beside the index by the end of its name: `.data-00000-of-00001`.

        Raises:
            UnreadableFileError: when the index is damaged.
        """
        self.entries: dict[str, Entry] = {}
        self._parts: dict[bytes, list[Entry]] = {}  # of divided variables, by name
        num_shards = 1
        for key, value, _ in table_entries(index):
            if not key:
                num_shards = _num_shards(value)
            elif key.startswith(b"\0"):  # a slice: the variable's name, an end, and where it lies in it
                self._parts.setdefault(key[1:].partition(b"\0\1")[0], []).append(_entry(value))
            else:
                self.entries[key.decode("utf-8", "replace")] = _entry(value)
        self._open = cache(lambda shard: open_shard(f".data-{shard:05}-of-{num_shards:05}"))

    def tensor(self, key: str) -> StoredTensor | None:
        """None for text and for types that PyTorch has not.

        Raises:
            UnreadableFileError: when its size is not that of its shape, or slices of it are missing.
        """
        entry = self.entries[key]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            return None
        if not entry.slices:
            return self._stored(key, entry, dtype)
        parts = self._parts.get(key.encode(), [])
        if len(parts) != len(entry.slices) or any(part.dtype != entry.dtype for part in parts):
            raise UnreadableFileError(f"{_DAMAGED}: slices of {key[:80]} are missing")
        chunks = []
        # both by where a slice begins: keys are written so that they sort like the numbers in them
        for piece, part in zip(sorted(entry.slices), parts, strict=True):
            if len(piece.starts) != len(entry.shape):
                raise UnreadableFileError(f"{_DAMAGED}: a slice of {key[:80]} has other dimensions")
            read = partial(self._stored, key, part, dtype)
            chunks.append(Chunk(piece.starts, piece.sizes(entry.shape), f"{part.shard}@{part.offset}", read))
        return join(entry.shape, dtype, chunks)

    def _stored(self, key: str, entry: Entry, dtype: torch.dtype) -> StoredTensor:
        storage = Storage(entry.size, lambda start, size: self._read(entry, start, size), key)
        tensor = stored_tensor(storage, dtype, 0, entry.shape, contiguous_stride(entry.shape[:64]))
        if tensor.num_elements * dtype.itemsize != entry.size:
            raise UnreadableFileError(f"{_DAMAGED}: {key[:80]} has another size than its shape tells")
        return tensor

    def object_graph(self) -> bytes | None:
        """The graph of objects that own the variables; None where there is none (TensorFlow 1).

        Raises:
            UnreadableFileError: when it is damaged.
        """
        entry = self.entries.get(OBJECT_GRAPH)
        if entry is None or entry.dtype != STRING:
            return None
        if entry.size > MAX_READ:
            raise UnreadableFileError(f"{_DAMAGED}: its graph of objects is far too large")
        data = self._read(entry, 0, entry.size)
        length, position = varint(data, 0)  # of the text, then 4 bytes of a checksum
        if position + 4 + length != len(data):
            raise UnreadableFileError(f"{_DAMAGED}: its graph of objects has another size than it claims")
        return data[position + 4 :]

    def _read(self, entry: Entry, start: int, size: int) -> bytes:
        data = self._open(entry.shard).read_at(entry.offset + start, size)
        is_checked = entry.checksum and entry.dtype != STRING and size == entry.size <= MAX_CHECKED
        if is_checked and _masked(data) != entry.checksum:
            raise UnreadableFileError("a damaged file: the checksum of a variable does not fit")
        return data


def _masked(data: bytes) -> int:
    """The checksum as TensorFlow keeps it: turned, so that none of data with checksums in it is odd."""
    value = crc32c(data)
    return (((value >> 15) | (value << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def is_table(source: ByteSource) -> bool:
    """Whether a file ends as a table of LevelDB does."""
    return source.size >= FOOTER and source.read_at(source.size - 8, 8) == MAGIC


def is_index(source: ByteSource) -> bool:
    """Whether it is the index of a checkpoint: a table whose first key is empty."""
    return is_table(source) and source.read_at(0, 2) == b"\0\0"


def table_entries(table: ByteSource) -> Iterator[tuple[bytes, bytes, int]]:
    """The keys of a table with their values and where those lie, in the table's order.

    Raises:
        UnreadableFileError: when it is damaged.
    """
    footer = table.read_at(table.size - FOOTER, FOOTER)
    position = 0
    for _ in range(2):  # where an index of other things lies, which is passed over
        _, position = varint(footer, position)
    place, _ = _handle(footer, position)
    end = 0
    left, num_entries = MAX_KEYS, 0
    for _, handle, _ in _block(table, *place):
        (start, size), _ = _handle(handle, 0)
        if start < end:  # they lie one after another; else few bytes could be read very often
            raise UnreadableFileError(f"{_DAMAGED}: its blocks overlap")
        end = start + size
        for key, value, position in _block(table, start, size):
            left -= len(key)
            num_entries += 1
            if left < 0 or num_entries > MAX_ENTRIES:
                raise UnreadableFileError(f"{_DAMAGED}: it has far too many keys")
            yield key, value, position


def _handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    start, position = varint(data, position)
    size, position = varint(data, position)
    return (start, size), position


def _block(table: ByteSource, start: int, size: int) -> Iterator[tuple[bytes, bytes, int]]:
    """The entries of one block, whose keys leave out what they share with the one before."""
    content = table.read_at(start, size + 1)  # a byte behind it tells how it is compressed
    if content[-1] != 0:
        raise ForeignFileError(
            "the index of a TensorFlow checkpoint, compressed, as TensorFlow never writes it; save it again"
        )
    num_restarts = int.from_bytes(content[size - 4 : size], "little")
    end = size - 4 - 4 * num_restarts
    if size < 4 or end < 0:
        raise UnreadableFileError(_DAMAGED)
    key, position = b"", 0
    while position < end:
        shared, position = varint(content, position)
        added, position = varint(content, position)
        length, position = varint(content, position)
        if shared > len(key) or shared + added > MAX_KEYS // 64 or position + added + length > end:
            raise UnreadableFileError(_DAMAGED)
        key = key[:shared] + content[position : position + added]
        position += added
        yield key, content[position : position + length], start + position
        position += length


def _num_shards(header: bytes) -> int:
    known = {number: value for number, value in fields(header) if isinstance(value, int)}
    if known.get(2):
        raise ForeignFileError("a TensorFlow checkpoint of a big-endian machine, which bncli does not read")
    num_shards = known.get(1, 1)
    if not 1 <= num_shards <= MAX_SHARDS:
        raise UnreadableFileError(f"{_DAMAGED}: it claims {num_shards:,} files")
    return num_shards


def _entry(value: bytes) -> Entry:
    numbers: dict[int, int] = {}
    shape: tuple[int, ...] = ()
    slices = []
    for number, part in fields(value):
        if isinstance(part, int):
            numbers[number] = part
        elif number == 2:
            shape = shape_of(part)
        elif number == 7:
            slices.append(_slice(part))
    dtype, shard, offset, size, checksum = (numbers.get(number, 0) for number in (1, 3, 4, 5, 6))
    return Entry(dtype, shape, shard, offset, size, checksum, tuple(slices))


def _slice(message: memoryview) -> Slice:
    """A TensorSliceProto: for each dimension the start, which is 0 if it is left out, and the length."""
    extents = []
    for number, part in fields(message):
        if number == 1 and not isinstance(part, int):
            known = {inner: value for inner, value in fields(part) if isinstance(value, int)}
            extents.append((known.get(1, 0), known.get(2, -1)))
    return Slice(tuple(start for start, _ in extents), tuple(length for _, length in extents))


def shape_of(message: memoryview) -> tuple[int, ...]:
    """A TensorShapeProto.

    Raises:
        UnreadableFileError: when it is damaged.
    """
    lengths = []
    for number, part in fields(message):
        if number == 2 and not isinstance(part, int):
            length = next((value for inner, value in fields(part) if inner == 1), 0)
            if not isinstance(length, int):
                raise UnreadableFileError(_DAMAGED)
            lengths.append(length)
    return tuple(lengths)
