"""Checkpoints in TensorFlow's first format: one file, a table whose values hold the numbers themselves.

`tf.train.Saver` wrote it until 2016, and published networks of that time are in it. The value of the empty
key lists names, types and shapes (SavedTensorSlices.meta), each other value is a part of a variable.
Reference: TensorFlow's core/protobuf/saved_tensor_slice.proto.
"""

import torch

from bncli.checkpoints.byte_source import ByteSource
from bncli.checkpoints.formats.protobuf import fields, inside, text
from bncli.checkpoints.formats.tensorflow_bundle import DTYPES, shape_of, table_entries
from bncli.checkpoints.stored_tensor import Storage, StoredTensor, contiguous_stride, stored_tensor

_NUMBERS = {torch.float32: 5, torch.float64: 6}  # the field of a TensorProto that has them


class FirstFormat:
    """The variables of a checkpoint by name, as far as they are whole and of float32 or float64."""

    def __init__(self, file: ByteSource) -> None:
        """All of the file is passed through once, as nothing in it tells where a variable lies.

        Raises:
            UnreadableFileError: when it is damaged.
        """
        self._file = file
        self.entries: dict[str, StoredTensor] = {}
        self.divided: dict[str, None] = {}  # names of variables that are not in one piece, which are left out
        known: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
        for key, value, position in table_entries(file):
            if not key:
                known = dict(map(_described, inside([value], 1, 1)))
                continue
            for part in inside([value], 2):
                values = dict(fields(part))
                name = text(values.get(1, 0))
                dtype, shape = known.get(name, (None, ()))
                tensor = self._tensor(value, position, values.get(3, 0), dtype, shape)
                if tensor is not None:
                    self.entries[name] = tensor
                elif dtype in _NUMBERS:
                    self.divided[name] = None

    def tensor(self, key: str) -> StoredTensor | None:
        """One of `entries`."""
        return self.entries[key]

    def object_graph(self) -> None:
        """It has none."""

    def _tensor(
        self,
        value: bytes,
        position: int,
        data: int | memoryview,
        dtype: torch.dtype | None,
        shape: tuple[int, ...],
    ) -> StoredTensor | None:
        if isinstance(data, int) or dtype not in _NUMBERS:
            return None
        numbers = dict(fields(data)).get(_NUMBERS[dtype], 0)
        # they end the value; a part of a variable has fewer numbers than the shape
        if isinstance(numbers, int) or not numbers or value[-len(numbers) :] != numbers:
            return None
        start, size = position + len(value) - len(numbers), len(numbers)
        storage = Storage(size, lambda first, count: self._file.read_at(start + first, count))
        elements = size // dtype.itemsize
        flat = stored_tensor(storage, dtype, 0, (elements,), (1,))
        tensor = StoredTensor(shape, dtype, storage, 0, contiguous_stride(shape[:64]))
        return tensor if tensor.num_elements == flat.num_elements and len(shape) <= 64 else None


def _described(message: bytes | memoryview) -> tuple[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """Name, type and shape of a SavedSliceMeta."""
    values = dict(fields(message))
    kind, shape = values.get(3, 0), values.get(2, 0)
    dtype = DTYPES.get(kind) if isinstance(kind, int) else None
    return text(values.get(1, 0)), (dtype, () if isinstance(shape, int) else shape_of(shape))


def is_first_format(file: ByteSource) -> bool:
    """Whether the empty key of a checkpoint's table has a list, not the number of files.

    Raises:
        UnreadableFileError: when it is damaged.
    """
    first = next(table_entries(file), None)
    return first is not None and any(
        number == 1 and not isinstance(value, int) for number, value in fields(first[1])
    )
