"""What PaddlePaddle exports for inference: `.pdiparams` with the numbers, and the program beside it.

The numbers follow one another without names, in the alphabetical order of the parameters' names, which are in
the program; so is which parameter is whose mean: names shift where a layer has no weight (`.w_1` or `.w_0`).
The program is a `.json` since Paddle 3 and a `.pdmodel` before, a protocol buffer (framework.proto).
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from bncli.batchnorm.conventions import PADDLE
from bncli.checkpoints.byte_source import ByteSource, ForeignFileError, UnreadableFileError
from bncli.checkpoints.formats.beside import read_beside
from bncli.checkpoints.formats.collected_network import Collected, are_statistics, contiguous, from_float32
from bncli.checkpoints.formats.protobuf import Wire, fields, inside, text
from bncli.checkpoints.formats.safetensors_file import parse_json
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
_ROLES = {"Mean": "running_mean", "Variance": "running_var", "Scale": "weight", "Bias": "bias"}
_BATCH_NORMS = ("batch_norm", "sync_batch_norm")
_TENSOR = 7  # the kind of a variable that is a tensor (LOD_TENSOR)


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
    new = read_beside(file, f"{stem}.json", MAX_PROGRAM)
    old = read_beside(file, f"{stem}.pdmodel", MAX_PROGRAM) if new is None else None
    if new is not None:
        names, norms = _of_json(parse_json(new))
    elif old is not None:
        names, norms = _of_protobuf(old)
    else:
        raise ForeignFileError(
            "numbers of PaddlePaddle without names; put its program beside it,"
            f" {stem[:80]}.json or {stem[:80]}.pdmodel"
        )
    stored = list(_tensors(file))
    if len(stored) != len(names):
        raise UnreadableFileError(
            f"it holds {len(stored):,} tensors where its program has {len(names):,}: of another export?"
        )
    return "paddle", _network(dict(zip(names, stored, strict=True)), norms)


class _Norm(NamedTuple):
    """A call of BatchNorm: its parameters' names by what they are, eps and momentum as Paddle writes them."""

    keys: dict[str, str]
    eps: float | None
    momentum: float | None


# ---- programs of Paddle 3


def _of_json(content: Mapping[str, Any]) -> tuple[list[str], list[_Norm]]:
    """The names of all parameters, in the order of the numbers, and the calls of BatchNorm."""
    parameters: dict[int, str] = {}
    calls: list[Mapping[str, Any]] = []
    for operation in _operations(content.get("program"), 0):
        _note(operation, parameters, calls)
    norms = []
    for operation in calls:
        numbers = [one.get("%") if isinstance(one, dict) else None for one in _list(operation, "I")[1:5]]
        keys = {
            leaf: parameters[number]
            for leaf, number in zip(_INPUTS, numbers, strict=False)
            if type(number) is int and number in parameters
        }
        said = {
            str(one.get("N")): one["AT"].get("D")
            for one in _list(operation, "A")
            if isinstance(one, dict) and isinstance(one.get("AT"), dict)
        }
        norms.append(_Norm(keys, _number(said.get("epsilon")), _number(said.get("momentum"))))
    return sorted(parameters.values()), norms


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
    elif kind.rpartition(".")[2].strip("_") in _BATCH_NORMS:
        norms.append(operation)


# ---- programs of Paddle 2: blocks with variables (3) and operations (4)


def _of_protobuf(program: bytes) -> tuple[list[str], list[_Norm]]:
    """The same of a `.pdmodel`."""
    names = set[str]()
    for variable in inside([program], 1, 3):
        said = dict(fields(variable))
        kind = dict(fields(part)).get(1) if not isinstance(part := said.get(2, 0), int) else None
        if said.get(3) == 1 and kind == _TENSOR:  # persistable, and not the place of inputs or outputs
            names.add(text(said.get(1, 0)))
    norms = [
        _norm_of(operation)
        for operation in inside([program], 1, 4)
        if any(number == 3 and text(value) in _BATCH_NORMS for number, value in fields(operation))
    ]
    return sorted(names), norms


def _norm_of(operation: bytes | memoryview) -> _Norm:
    keys, numbers = dict[str, str](), dict[str, float]()
    for number, part in fields(operation):
        if isinstance(part, int) or number not in (1, 4):
            continue
        said = dict(fields(part))
        name, value = text(said.get(1, 0)), said.get(2 if number == 1 else 4)
        if number == 1 and name in _ROLES and value is not None:
            keys[_ROLES[name]] = text(value)
        elif number == 4 and isinstance(value, int):
            numbers[name] = struct.unpack("<f", struct.pack("<I", value & 0xFFFFFFFF))[0]
    return _Norm(keys, _number(numbers.get("epsilon")), _number(numbers.get("momentum")))


# ---- the numbers


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


def _network(tensors: Mapping[str, StoredTensor], norms: list[_Norm]) -> object:
    found, used = Collected(), set[str]()
    for keys, eps, momentum in norms:
        parts = {leaf: tensors[key] for leaf, key in keys.items() if key in tensors}
        if not are_statistics(parts.get("running_mean"), parts.get("running_var")):
            continue
        name = keys["running_mean"].rpartition(".")[0] or keys["running_mean"]
        if name in found.layers:  # called once more
            continue
        found.add(name, parts, PADDLE, eps=eps, momentum=momentum)
        used.update(keys.values())
    found.add_others({name: tensor for name, tensor in tensors.items() if name not in used})
    return found.network()


def _number(value: object) -> float | None:
    is_sound = isinstance(value, int | float) and abs(value) < 1e30
    return from_float32(float(value)) if is_sound else None  # type: ignore[arg-type]
