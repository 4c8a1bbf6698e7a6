"""Files of safetensors: the length of a header (8 bytes), the header in JSON, the numbers.

The library `safetensors` maps local files into memory; this reads the few tensors of interest by position,
from a URL as well. The header is checked as that library does. Reference: its README, "Format".
"""

import json
from collections.abc import Mapping

import torch

from bncli.checkpoints.byte_source import ByteSource, UnreadableFileError
from bncli.checkpoints.stored_tensor import Storage, StoredTensor, contiguous_stride, stored_tensor

# Parsed JSON takes up to 30 times its size, hence a limit below that of the library (100 MB); 130,000 tensors
# have room.
MAX_HEADER = 16 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def is_safetensors(start: bytes) -> bool:
    """Whether a file that starts so is meant as safetensors: a header's length, then its first brace."""
    return len(start) > 8 and start[8:9] == b"{" and start[5:8] == b"\0\0\0"


def read_safetensors(source: ByteSource) -> dict[str, StoredTensor]:
    """The tensors by name, in the order of the header.

    Raises:
        UnreadableFileError: when it is damaged or truncated.
    """
    return read_with_metadata(source)[0]


def read_with_metadata(source: ByteSource) -> tuple[dict[str, StoredTensor], Mapping[str, object]]:
    """The same, and what else the header says: text under names, as a rule.

    Raises:
        UnreadableFileError: when it is damaged or truncated.
    """
    length = int.from_bytes(source.read_at(0, 8), "little")
    if length > MAX_HEADER:
        raise UnreadableFileError(
            f"a safetensors header of {length:,} bytes; bncli reads up to {MAX_HEADER:,}"
        )
    header = parse_json(source.read_at(8, length))
    start = 8 + length
    said = header.pop("__metadata__", None)
    tensors = {name: _tensor(source, start, name, entry) for name, entry in header.items()}
    return tensors, said if isinstance(said, dict) else {}


def parse_json(data: bytes) -> dict[str, object]:
    """A JSON object of a file.

    Raises:
        UnreadableFileError: when it is none.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise UnreadableFileError("a damaged file: its header is no JSON") from None
    if not isinstance(content, dict):
        raise UnreadableFileError("a damaged file: its header is no JSON object")
    return content


def _tensor(source: ByteSource, start: int, name: str, entry: object) -> StoredTensor:
    fields = entry if isinstance(entry, dict) else {}
    offsets, shape, kind = fields.get("data_offsets"), fields.get("shape"), fields.get("dtype")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
        or not isinstance(shape, list)
        or not all(type(length) is int for length in shape)
    ):
        raise UnreadableFileError(f"a damaged file: no shape and place of tensor {name[:80]}")
    begin, end = offsets
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise UnreadableFileError(f"tensor {name[:80]} has a type that bncli does not know: {str(kind)[:20]}")
    if not 0 <= begin <= end <= source.size - start:
        raise UnreadableFileError(f"a damaged or truncated file: tensor {name[:80]} ends beyond it")
    storage = Storage(
        end - begin,
        lambda first, size: source.read_at(start + begin + first, size),
        position=lambda: start + begin,
    )
    tensor = stored_tensor(storage, dtype, 0, tuple(shape), contiguous_stride(tuple(shape[:64])))
    if tensor.num_elements * dtype.itemsize != end - begin:
        raise UnreadableFileError(f"a damaged file: tensor {name[:80]} has another size than its shape tells")
    return tensor
