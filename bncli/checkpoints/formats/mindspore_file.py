"""Checkpoints of MindSpore (`.ckpt`): a protocol buffer of parameters, a name and a tensor each.

The names are those of `nn.BatchNorm` (moving_mean, gamma) or of `mint.nn` (running_mean, weight), which
counts and means momentum as PyTorch does. Reference: mindspore/ccsrc/utils/checkpoint.proto.
"""

import torch

from bncli.checkpoints.byte_source import ByteSource, UnreadableFileError
from bncli.checkpoints.formats.collected_network import contiguous
from bncli.checkpoints.formats.named_arrays import recognise
from bncli.checkpoints.formats.protobuf import BYTES, Field, Wire
from bncli.checkpoints.stored_tensor import MAX_DIMENSIONS, Storage, StoredTensor

_DTYPES = {
    "Float32": torch.float32,
    "Float16": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float64": torch.float64,
    "Int8": torch.int8,
    "Int16": torch.int16,
    "Int32": torch.int32,
    "Int64": torch.int64,
    "UInt8": torch.uint8,
    "Bool": torch.bool,
}
_CHECKSUM = b"crc_num"  # what stands before the last ten bytes of a file with a checksum


def read_if_mindspore(file: ByteSource, start: bytes) -> tuple[str, object] | None:
    """A checkpoint of MindSpore; None for another file.

    Raises:
        UnreadableFileError: on damage.
    """
    if start[:1] != b"\x0a":
        return None
    wire, end = Wire(file), file.size
    if end > 17 and file.read_at(end - 17, 7) == _CHECKSUM:
        end -= 17
    try:
        first = next(wire.fields(0, end))
        if _parameter(wire, first) is None:
            return None
    except (UnreadableFileError, StopIteration):
        return None
    tensors: dict[str, StoredTensor] = {}
    parts = set[str]()
    for one in wire.fields(0, end):
        known = _parameter(wire, one) if one.number == 1 and one.kind == BYTES else None
        if known is None:
            continue
        name, dims, kind, content = known
        if name in tensors or name in parts:  # a large one lies in several pieces
            parts.add(name)
            continue
        tensor = _tensor(wire, dims, kind, content)
        if tensor is None:
            parts.add(name)
        else:
            tensors[name] = tensor
    for name in parts:
        tensors.pop(name, None)
    found = recognise(tensors)
    return "mindspore", tensors if found is None else found.network()


_Parameter = tuple[str, list[int], str, Field]


def _parameter(wire: Wire, message: Field) -> _Parameter | None:
    """Name, shape, type and numbers of a parameter; None for what is none."""
    name, dims, kind = "", list[int](), ""
    content: Field | None = None
    for one in wire.inside(message):
        if one.number == 1:
            name = wire.text(one)
        elif one.number == 2:
            for part in wire.inside(one):
                if part.number == 1:
                    dims += wire.numbers(part, MAX_DIMENSIONS)
                elif part.number == 2:
                    kind = wire.text(part)
                elif part.number == 3 and part.kind == BYTES:
                    content = part
                if len(dims) > MAX_DIMENSIONS:
                    raise UnreadableFileError("a damaged file: a tensor with too many dimensions")
    if not name or kind not in _DTYPES or content is None:
        return None
    return name, dims, kind, content


def _tensor(wire: Wire, dims: list[int], kind: str, content: Field) -> StoredTensor | None:
    """The tensor; None where this is only a piece of it."""
    dtype, size = _DTYPES[kind], 1
    for length in dims:
        if length < 0:
            raise UnreadableFileError("a damaged file: a tensor without a proper shape")
        size = min(size * length, 2**62)
    if size * dtype.itemsize != content.size:
        return None
    source, start = wire.source, content.start
    storage = Storage(
        content.size,
        lambda first, count: source.read_at(start + first, count),
        f"@{start}",
        position=lambda: start,
    )
    return contiguous(storage, dtype, tuple(dims))
