"""What PaddlePaddle exports for inference: `.pdiparams` with the numbers, `.json` beside it with the program.

The numbers follow one another without names, in the alphabetical order of the parameters' names, which are in
the program; so is which parameter is whose mean: names shift where a layer has no weight (`.w_1` or `.w_0`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bncli.batchnorm.conventions import PADDLE
from bncli.checkpoints.byte_source import ByteSource, ForeignFileError, UnreadableFileError
from bncli.checkpoints.formats.beside import read_beside
from bncli.checkpoints.formats.collected_network import Collected, are_statistics, contiguous, from_float32
from bncli.checkpoints.formats.safetensors_file import parse_json
from bncli.checkpoints.formats.wire_format import Wire
from bncli.checkpoints.stored_tensor import MAX_DIMENSIONS, Storage, StoredTensor

MAX_PROGRAM = 32 * 2**20  # bytes
MAX_TENSORS = 200_000
MAX_DEPTH = 60  # of blocks in each other
_DTYPES = {
    0: torch.bool,
    1: torch.int16,
    2: torch.int32,
    3: torch.int64,
    4: torch.float16,
    5: torch.float32,
    6: torch.float64,
    20: torch.uint8,
    21: torch.int8,
    22: torch.bfloat16,
}
_INPUTS = ("running_mean", "running_var", "weight", "bias")  # of the operator, behind its first


def read_if_paddle(file: ByteSource, start: bytes) -> tuple[str, object] | None:
    """Parameters of an exported network; None for another file.

    Raises:
        UnreadableFileError: on damage.
        ForeignFileError: where the program beside it is missing.
    """
    if (
        start[:16] != bytes(16)
        or len(start) < 24
        or start[20:21] != b"\x08"
        or start[22:23] not in (b"\x10", b"\x12")
    ):
        return None
    stem = file.name.rpartition("/")[2].removesuffix(".pdiparams")
    content = read_beside(file, f"{stem}.json", MAX_PROGRAM)
    if content is None:
        raise ForeignFileError(
            f"numbers of PaddlePaddle without names; put its program {stem[:80]}.json beside it"
        )
    parameters: dict[int, str] = {}
    norms: list[Mapping[str, Any]] = []
    for operation in _operations(parse_json(content).get("program"), 0):
        _note(operation, parameters, norms)
    stored, names = list(_tensors(file)), sorted(parameters.values())
    if len(stored) != len(names):
        raise UnreadableFileError(
            f"it holds {len(stored):,} tensors where its program has {len(names):,}: of another export?"
        )
    tensors = dict(zip(names, stored, strict=True))
    return "paddle", _network(tensors, parameters, norms)


def _operations(node: object, depth: int) -> Iterator[Mapping[str, Any]]:
    """All operations of a program, in their order, also of the regions of operations."""
    if depth > MAX_DEPTH:
        raise UnreadableFileError("a damaged program: it is nested without end")
    for region in _list(node, "regions"):
        for block in _list(region, "blocks"):
            for operation in _list(block, "ops"):
                if isinstance(operation, dict):
                    yield operation
                    yield from _operations(operation, depth + 1)


def _list(node: object, key: str) -> list[Any]:
    value = node.get(key) if isinstance(node, dict) else None
    return value if isinstance(value, list) else []


def _note(operation: Mapping[str, Any], parameters: dict[int, str], norms: list[Mapping[str, Any]]) -> None:
    kind = str(operation.get("#", ""))
    if kind == "p":
        said, result = operation.get("A"), operation.get("O")
        number = result.get("%") if isinstance(result, dict) else None
        if isinstance(said, list) and said and isinstance(said[-1], str) and type(number) is int:
            parameters[number] = said[-1]
    elif kind.rpartition(".")[2].strip("_") in ("batch_norm", "sync_batch_norm"):
        norms.append(operation)


def _tensors(file: ByteSource) -> Iterator[StoredTensor]:
    """All tensors: three versions and counts of 0, the length of a message with type and shape, numbers."""
    wire, position = Wire(file), 0
    for _ in range(MAX_TENSORS):
        if position == file.size:
            return
        head = file.read_at(position, 20)
        length = int.from_bytes(head[16:], "little")
        if head[:16] != bytes(16) or length > 2000:
            raise UnreadableFileError("a damaged or truncated file of PaddlePaddle")
        kind, shape = -1, list[int]()
        for one in wire.fields(position + 20, position + 20 + length):
            if one.number == 1:
                kind = one.value
            elif one.number == 2:
                shape += wire.numbers(one, MAX_DIMENSIONS)
        dtype = _DTYPES.get(kind)
        if dtype is None or len(shape) > MAX_DIMENSIONS or any(length < 0 for length in shape):
            raise UnreadableFileError("a damaged file: a tensor without a proper type and shape")
        start, size = position + 20 + length, dtype.itemsize
        for extent in shape:
            size = min(size * extent, 2**62)
        if start + size > file.size:
            raise UnreadableFileError("a damaged or truncated file: a tensor reaches beyond its end")
        yield contiguous(_storage(file, start, size), dtype, tuple(shape))
        position = start + size
    raise UnreadableFileError(f"more than {MAX_TENSORS:,} tensors")


def _storage(file: ByteSource, start: int, size: int) -> Storage:
    return Storage(
        size, lambda first, count: file.read_at(start + first, count), f"@{start}", position=lambda: start
    )


def _network(
    tensors: Mapping[str, StoredTensor], parameters: Mapping[int, str], norms: list[Mapping[str, Any]]
) -> object:
    found, used = Collected(), set[str]()
    for operation in norms:
        numbers = [one.get("%") if isinstance(one, dict) else None for one in _list(operation, "I")[1:5]]
        keys = {
            leaf: parameters[number]
            for leaf, number in zip(_INPUTS, numbers, strict=False)
            if type(number) is int and number in parameters
        }
        parts = {leaf: tensors[key] for leaf, key in keys.items()}
        if not are_statistics(parts.get("running_mean"), parts.get("running_var")):
            continue
        name = keys["running_mean"].rpartition(".")[0] or keys["running_mean"]
        if name in found.layers:  # called once more
            continue
        said = {
            str(one.get("N")): one["AT"].get("D")
            for one in _list(operation, "A")
            if isinstance(one, dict) and isinstance(one.get("AT"), dict)
        }
        found.add(
            name, parts, PADDLE, eps=_number(said.get("epsilon")), momentum=_number(said.get("momentum"))
        )
        used.update(keys.values())
    found.add_others({name: tensor for name, tensor in tensors.items() if name not in used})
    return found.network()


def _number(value: object) -> float | None:
    return from_float32(float(value)) if isinstance(value, int | float) and abs(value) < 1e30 else None
