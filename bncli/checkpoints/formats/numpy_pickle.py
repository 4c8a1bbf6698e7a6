"""Pickles of dicts and lists with arrays of NumPy or JAX, read as data: nothing is unpickled.

An array's numbers are bytes in the pickle, which are left where they lie. A pickle of JAX's arrays is one of
NumPy's in a call of `jax._src.array._reconstruct_array`; of protocol 2 and before, the bytes are text.
"""

import io
from collections.abc import Callable, Iterator

import torch

from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.formats.inert_pickle import BYTES, Global, Inert, read_pickle
from bncli.checkpoints.formats.npy import TYPES
from bncli.checkpoints.stored_tensor import Storage, StoredTensor, contiguous_stride, stored_tensor

Path = tuple[str, ...]
Read = Callable[[int, int], bytes]  # bytes of the stream: start, size
MAX_DEPTH = 60
MAX_STEPS = 500_000  # from container to content
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since NumPy 2
_DICTS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict")


class _Meanings:
    """Every call is kept as it is asked for, but those of plain containers."""

    def call(self, function: Global, arguments: tuple[object, ...]) -> object:
        if function.path in _DICTS:
            return {}
        if function.path in ("_codecs.encode", "codecs.encode") and len(arguments) == 2:
            text = arguments[0]
            return text.encode("latin-1") if isinstance(text, str) else Inert(function, arguments)
        return Inert(function, arguments)

    def find_persistent(self, _: object) -> object:
        return Inert(None)


def read_arrays(stream: io.BufferedReader | io.BytesIO, read: Read) -> Iterator[tuple[Path, StoredTensor]]:
    """Every array of the pickle with its path; `read` gives bytes of the stream.

    Raises:
        UnreadableFileError: on damage.
    """
    content = read_pickle(stream, _Meanings())
    return _arrays(content, read)


def _arrays(content: object, read: Read) -> Iterator[tuple[Path, StoredTensor]]:
    waiting: list[tuple[Path, object]] = [((), content)]
    steps = 0
    while waiting:
        path, node = waiting.pop()
        steps += 1
        if steps > MAX_STEPS or len(path) > MAX_DEPTH:
            raise UnreadableFileError("a pickle of too many values, or nested too deeply")
        tensor = _tensor(node, read) if isinstance(node, Inert) else None
        if tensor is not None:
            yield path, tensor
        else:
            parts = list(_parts(node))
            waiting += [((*path, *name), part) for name, part in reversed(parts)]


def _parts(node: object) -> Iterator[tuple[Path, object]]:
    """What a container holds by name; a class of somebody's has its arguments, items and attributes."""
    if isinstance(node, dict):
        yield from (((str(key),), part) for key, part in node.items())
    elif isinstance(node, list | tuple) and not isinstance(node, Global):
        yield from (((str(index),), part) for index, part in enumerate(node))
    elif isinstance(node, Inert):
        if node.kind is not None and node.kind.name == "_reconstruct" and _is_tuple(node.state, 5):
            yield from _objects(node.state)
            return
        # a mapping around a dict, as Haiku's FlatMapping, adds nothing to the path
        arguments = node.arguments if isinstance(node.arguments, tuple) else ()
        for index, part in enumerate(arguments):
            if isinstance(part, dict | list | tuple | Inert) and not isinstance(part, Global):
                yield (() if len(arguments) == 1 else (str(index),)), part
        for mapping in (node.items, node.attributes):
            if mapping:
                yield from (((str(key),), part) for key, part in mapping.items())


def _objects(state: object) -> Iterator[tuple[Path, object]]:
    """An array of objects, as NumPy makes of a dict: its elements, and a single one without a number."""
    values = state[4] if isinstance(state, tuple) else ()
    if isinstance(values, list):
        yield from ((() if len(values) == 1 else (str(index),), part) for index, part in enumerate(values))


def _is_tuple(value: object, length: int) -> bool:
    return isinstance(value, tuple) and len(value) == length


def _tensor(node: Inert, read: Read) -> StoredTensor | None:
    """An array, or a scalar; None for all else, and for a type that bncli does not read."""
    kind, arguments = node.kind, node.arguments
    if kind is None or not isinstance(arguments, tuple):
        return None
    if kind.module in _MODULES and kind.name == "_reconstruct":
        return _of_state(node.state, read)
    if kind.module == "jax._src.array" and kind.name == "_reconstruct_array" and len(arguments) >= 3:
        return _of_state(arguments[2], read)
    if kind.module in _MODULES and kind.name == "scalar" and len(arguments) == 2:
        return _array((), arguments[0], arguments[1], read, by_column=False)
    if kind.name == "_frombuffer" and kind.module.startswith("numpy") and len(arguments) == 4:
        data, dtype, shape, order = arguments
        return _array(shape, dtype, data, read, by_column=order == "F")
    return None


def _of_state(state: object, read: Read) -> StoredTensor | None:
    """Of what an array's `__setstate__` gets: version, shape, type, whether by column, numbers."""
    if not isinstance(state, tuple) or len(state) != 5:
        return None
    return _array(state[1], state[2], state[4], read, by_column=state[3] is True)


def _array(shape: object, dtype: object, data: object, read: Read, *, by_column: bool) -> StoredTensor | None:
    kind = _dtype(dtype)
    if (
        kind is None
        or not isinstance(shape, tuple)
        or len(shape) > 64
        or not all(type(length) is int and 0 <= length < 2**48 for length in shape)
    ):
        return None
    if isinstance(data, Inert) and data.kind == BYTES and isinstance(data.arguments, tuple):
        size, start = data.arguments
        storage = Storage(size, lambda first, count: read(start + first, count), f"@{start}")
    elif isinstance(data, bytes | str):
        if isinstance(data, str):  # of Python 2
            data = data.encode("latin-1", "replace")
        storage = Storage(len(data), lambda first, count: data[first : first + count])
    else:
        return None
    stride = contiguous_stride(shape)
    if by_column:
        stride = tuple(reversed(contiguous_stride(shape[::-1])))
    return stored_tensor(storage, kind, 0, shape, stride)


def _dtype(node: object) -> torch.dtype | None:
    """`numpy.dtype('f4')` with its byte order, or the type of ml_dtypes."""
    if not isinstance(node, Inert) or not isinstance(node.arguments, tuple) or not node.arguments:
        return None
    name = node.arguments[0]
    if isinstance(name, Global):
        return torch.bfloat16 if name == Global("ml_dtypes", "bfloat16") else None
    order = node.state[1] if isinstance(node.state, tuple) and len(node.state) > 1 else "<"
    return TYPES.get(f"{order}{name}")
