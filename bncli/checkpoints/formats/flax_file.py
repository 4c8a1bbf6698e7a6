"""Files of Flax: `flax.serialization.to_bytes` and `msgpack_serialize`.

MessagePack of nested maps. An array is an extension of type 1, which is MessagePack itself: shape, name of
the type, numbers row by row. A scalar of NumPy is one of type 3. An array of more than 2^30 bytes is a map of
such arrays. Reference: flax/serialization.py.
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

import torch

from bncli.checkpoints.byte_source import ByteSource, UnreadableFileError
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.jax_tree import DTYPES, Path, read_tree
from bncli.checkpoints.formats.message_pack import MessagePack, Run
from bncli.checkpoints.formats.safetensors_file import is_safetensors
from bncli.checkpoints.stored_tensor import Storage, StoredTensor, contiguous_stride, stored_tensor

MAX_SEARCHED = 2**20  # bytes in which the name of a type has to stand
_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
# the types of arrays, as MessagePack spells them: a length and the name
_TYPES = tuple(bytes([0xA0 + len(name)]) + name.encode() for name in DTYPES)


def read_if_flax(file: ByteSource, start: bytes) -> tuple[str, ForeignNetwork] | None:
    """A file of Flax; None for another.

    Raises:
        UnreadableFileError: on damage.
    """
    if is_safetensors(start) or not _is_flax(file, start):
        return None
    reader = MessagePack(file, 0, file.size)
    content = reader.read()
    if reader.position != file.size:
        raise UnreadableFileError("a damaged file of Flax: something follows its content")
    return "flax msgpack", read_tree(dict(_leaves(file, content, ())))


def _is_flax(file: ByteSource, start: bytes) -> bool:
    """A map whose first key is text, and in which the names of array types stand."""
    size = 1 if 0x81 <= start[0] <= 0x8F else {0xDE: 3, 0xDF: 5}.get(start[0])  # of the head of a map
    if size is None or len(start) <= size + 2:
        return False
    first = size + 1 if 0xA1 <= start[size] <= 0xBF else size + 2  # character of the key
    is_key = (first == size + 1 or start[size] == 0xD9) and 0x20 <= start[first] < 0x7F
    if not is_key:
        return False
    searched = file.read_at(0, min(file.size, MAX_SEARCHED))
    return any(name in searched for name in _TYPES)


def _leaves(file: ByteSource, node: object, path: Path) -> Iterator[tuple[Path, StoredTensor]]:
    """Every array with its path; lists are numbered, as Flax makes maps of them."""
    if isinstance(node, dict) and _CHUNKED in node:
        tensor = _joined(file, node)
        if tensor is not None:
            yield path, tensor
    elif isinstance(node, dict | list):
        parts = node.items() if isinstance(node, dict) else enumerate(node)
        for key, part in parts:
            yield from _leaves(file, part, (*path, str(key)))
    elif isinstance(node, Run) and node.code in (_ARRAY, _SCALAR):
        tensor = _array(file, node)
        if tensor is not None:
            yield path, tensor


def _array(file: ByteSource, run: Run) -> StoredTensor | None:
    """An extension of Flax; None for a type that bncli does not read."""
    content = MessagePack(file, run.start, run.start + run.size).read()
    if not isinstance(content, list) or len(content) != 3:
        raise UnreadableFileError("a damaged file of Flax: an array without shape, type and numbers")
    shape, kind, numbers = content
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if not isinstance(shape, list) or not isinstance(numbers, Run):
        raise UnreadableFileError("a damaged file of Flax: an array without shape, type and numbers")
    if dtype is None:
        return None
    storage = _storage(file, numbers)
    tensor = _view(storage, dtype, shape)
    if tensor.num_elements * dtype.itemsize != numbers.size:
        raise UnreadableFileError(f"a damaged file of Flax: an array of shape {tensor.shape} of other size")
    return tensor


def _view(storage: Storage, dtype: torch.dtype, shape: list[object]) -> StoredTensor:
    if not all(type(length) is int and 0 <= length < 2**40 for length in shape) or len(shape) > 64:
        raise UnreadableFileError("a damaged file of Flax: an array without a proper shape")
    lengths = tuple(length for length in shape if isinstance(length, int))
    return stored_tensor(storage, dtype, 0, lengths, contiguous_stride(lengths))


def _storage(file: ByteSource, run: Run) -> Storage:
    return Storage(
        run.size,
        lambda start, size: file.read_at(run.start + start, size),
        position=lambda: run.start,
    )


def _joined(file: ByteSource, node: dict[str | int, object]) -> StoredTensor | None:
    """An array in chunks: those of `chunks`, one after another, in the shape that `shape` has."""
    shape, chunks = node.get("shape"), node.get("chunks")
    if not isinstance(shape, dict) or not isinstance(chunks, dict) or not chunks:
        raise UnreadableFileError("a damaged file of Flax: chunks of an array without a shape")
    lengths = [shape.get(str(index)) for index in range(len(shape))]
    runs = [chunks.get(str(index)) for index in range(len(chunks))]
    parts = [_array(file, run) if isinstance(run, Run) else None for run in runs]
    found = [part for part in parts if part is not None]
    if len(found) != len(parts) or len({part.dtype for part in found}) != 1:
        raise UnreadableFileError("a damaged file of Flax: an array of which a chunk is missing")
    ends = list(accumulate(part.storage.size for part in found))

    def read(start: int, size: int) -> bytes:
        data, index = bytearray(), bisect_right(ends, start)
        while len(data) < size and index < len(found):
            storage = found[index].storage
            inside = start + len(data) - (ends[index] - storage.size)
            data += storage.read(inside, min(size - len(data), storage.size - inside))
            index += 1
        return bytes(data)

    return _view(Storage(ends[-1], read), found[0].dtype, lengths)
