"""Parameter files of MXNet (`.params`), with the network's description (`-symbol.json`) where it lies beside.

The description tells what the numbers cannot: eps, momentum, the order of layers, and that a gamma is ignored
(`fix_gamma`, which the operator has unless told otherwise). Reference: src/ndarray/ndarray.cc, NDArray::Save.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bncli.batchnorm.conventions import MXNET
from bncli.checkpoints.byte_source import ByteSource, UnreadableFileError
from bncli.checkpoints.formats.beside import read_beside
from bncli.checkpoints.formats.collected_network import LEAVES, Collected, are_statistics, contiguous, listed
from bncli.checkpoints.formats.named_arrays import collect
from bncli.checkpoints.formats.safetensors_file import parse_json
from bncli.checkpoints.stored_tensor import MAX_DIMENSIONS, Storage, StoredTensor

_SIGNATURE = b"\x12\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
_V2, _V3 = 0xF993FAC9, 0xF993FACA
MAX_ARRAYS = 200_000
MAX_NAME = 4096  # characters
MAX_DESCRIPTION = 16 * 2**20  # bytes
_DTYPES = {
    0: torch.float32,
    1: torch.float64,
    2: torch.float16,
    3: torch.uint8,
    4: torch.int32,
    5: torch.int8,
    6: torch.int64,
    7: torch.bool,
    12: torch.bfloat16,
}
_EPS_OF_OPERATOR, _MOMENTUM_OF_OPERATOR = 1e-3, 0.9
# what Gluon and what the operator call the four
_NAMES = (
    ("gamma", "beta", "running_mean", "running_var"),
    ("gamma", "beta", "moving_mean", "moving_var"),
)


def read_if_mxnet(file: ByteSource, start: bytes) -> tuple[str, object] | None:
    """A parameter file; None for another.

    Raises:
        UnreadableFileError: on damage.
    """
    if not start.startswith(_SIGNATURE):
        return None
    tensors = {re.sub(r"^(?:arg|aux):", "", name): tensor for name, tensor in _arrays(file)}
    found = _described(tensors, _description(file))
    return "mxnet", (_by_name(tensors) if found is None else found).network()


def _arrays(file: ByteSource) -> Iterator[tuple[str, StoredTensor]]:
    """All arrays in their order; names come behind them."""
    count, position = _whole(file, 16, 8), 24
    if count > MAX_ARRAYS:
        raise UnreadableFileError(f"a damaged file: {count:,} arrays")
    tensors: list[StoredTensor | None] = []
    for _ in range(count):
        tensor, position = _array(file, position)
        tensors.append(tensor)
    num_names, position = _whole(file, position, 8), position + 8
    if num_names not in (0, count):
        raise UnreadableFileError("a damaged file: not a name for every array")
    for index, tensor in enumerate(tensors):
        name = str(index)
        if num_names:
            length = _whole(file, position, 8)
            if length > MAX_NAME:
                raise UnreadableFileError("a damaged file: a name without bounds")
            name = file.read_at(position + 8, length).decode("utf-8", "replace")
            position += 8 + length
        if tensor is not None:
            yield name, tensor


def _array(file: ByteSource, position: int) -> tuple[StoredTensor | None, int]:
    """An array, and where it ends: magic, kind of storage, shape, device (8 bytes), type, numbers."""
    magic, kind, rank = (_whole(file, position + offset, 4) for offset in (0, 4, 8))
    if magic not in (_V2, _V3):
        raise UnreadableFileError("a damaged file, or of MXNet before 1.0")
    if kind != 0:
        raise UnreadableFileError("it holds a sparse array, which bncli does not read")
    if (rank == 0 and magic == _V2) or rank == 2**32 - 1:  # an array that was never made
        return None, position + 12
    if rank > MAX_DIMENSIONS:
        raise UnreadableFileError("a damaged file: a tensor with too many dimensions")
    shape = tuple(_whole(file, position + 12 + 8 * axis, 8) for axis in range(rank))
    position += 12 + 8 * rank
    dtype = _DTYPES.get(_whole(file, position + 8, 4))
    position += 12
    if dtype is None:
        raise UnreadableFileError("it holds an array of a type that bncli does not know")
    size = dtype.itemsize
    for length in shape:
        size *= length
        if size > file.size:
            raise UnreadableFileError("a damaged or truncated file: an array reaches beyond its end")
    if position + size > file.size:
        raise UnreadableFileError("a damaged or truncated file: an array reaches beyond its end")
    begin = position
    storage = Storage(
        size,
        lambda first, count: file.read_at(begin + first, count),
        f"@{begin}",
        position=lambda: begin,
    )
    return contiguous(storage, dtype, shape), position + size


def _whole(file: ByteSource, position: int, size: int) -> int:
    return int.from_bytes(file.read_at(position, size), "little")


def _by_name(tensors: Mapping[str, StoredTensor]) -> Collected:
    """Without a description: Gluon's names are `0.gamma` or `batchnorm0_gamma`."""
    found = Collected()
    for names in _NAMES:
        for sign in (".", "_"):
            found = collect(tensors, MXNET, sign, names)
            if found.layers:
                found.notes.append(
                    "a layer may ignore its gamma (fix_gamma), which only the -symbol.json beside it tells"
                )
                return found
    found.add_others(tensors)
    return found


# ---- the description


def _description(file: ByteSource) -> list[Any]:
    """The nodes of the network, in their order; none where there is no description."""
    name = file.name.rpartition("/")[2]
    stem = name.removesuffix(".params")
    for place in dict.fromkeys((f"{re.sub(r'-[0-9]{4}$', '', stem)}-symbol.json", f"{stem}-symbol.json")):
        content = read_beside(file, place, MAX_DESCRIPTION)
        if content is not None:
            nodes = parse_json(content).get("nodes")
            return nodes if isinstance(nodes, list) else []
    return []


def _described(tensors: Mapping[str, StoredTensor], nodes: list[Any]) -> Collected | None:
    found, used, ignored = Collected(), set[str](), []
    for node in nodes:
        if not isinstance(node, dict) or node.get("op") not in ("BatchNorm", "SyncBatchNorm"):
            continue
        keys = _inputs(node, nodes)
        parts = {leaf: tensors[key] for leaf, key in zip(LEAVES, keys, strict=False) if key in tensors}
        if not are_statistics(parts.get("running_mean"), parts.get("running_var")):
            continue
        name = str(node.get("name", "")).removesuffix("_fwd")
        if not name or name in found.layers:
            continue
        attributes = node.get("attrs") or node.get("param") or {}
        said = {key: str(value) for key, value in attributes.items()} if isinstance(attributes, dict) else {}
        if said.get("fix_gamma", "True") in ("True", "1", "true") and "weight" in parts:
            parts["weight"] = _ones(parts["weight"])
            ignored.append(name)
        found.add(
            name,
            parts,
            MXNET,
            eps=_number(said.get("eps"), _EPS_OF_OPERATOR),
            momentum=_number(said.get("momentum"), _MOMENTUM_OF_OPERATOR),
        )
        used.update(keys)
    if not found.layers:
        return None
    if ignored:
        found.notes.append(f"{listed(ignored)}: gamma is ignored (fix_gamma), so weight is 1 here")
    found.add_others({name: tensor for name, tensor in tensors.items() if name not in used})
    return found


def _inputs(node: Mapping[str, Any], nodes: list[Any]) -> list[str]:
    """The names of gamma, beta, mean and variance."""
    names = []
    inputs = node.get("inputs")
    for entry in (inputs if isinstance(inputs, list) else [])[1:5]:
        index = entry[0] if isinstance(entry, list) and entry else None
        known = type(index) is int and 0 <= index < len(nodes) and isinstance(nodes[index], dict)
        names.append(str(nodes[index].get("name", "")) if known else "")  # type: ignore[index]
    return names


def _number(text: str | None, default: float) -> float | None:
    try:
        return default if text is None else float(text)
    except ValueError:
        return None


def _ones(tensor: StoredTensor) -> StoredTensor:
    """As many ones as there are channels."""
    one = bytes(torch.ones(1, dtype=tensor.dtype).view(torch.uint8).tolist())
    size = len(one)

    def read(start: int, count: int) -> bytes:
        return (one * (count // size + 2))[start % size :][:count]

    return contiguous(Storage(tensor.num_elements * size, read), tensor.dtype, (tensor.num_elements,))
