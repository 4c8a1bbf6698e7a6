"""Directories of torch.distributed.checkpoint: one network in the files of several processes (ranks).

`.metadata` is a pickle: every tensor's type, size and chunks, and in which file each chunk lies. A chunk in
`__RANK_NUMBER.distcp` is a whole file of `torch.save`, which may be compressed by zstd. With
`use_collectives=False` each rank writes a `__RANK.metadata` and a network of its own. Written as safetensors
(HuggingFaceStorageWriter), every file tells in its header where in the whole its tensors belong.

What all ranks hold alike, as BatchNorm's buffers under DDP and FSDP2, is written once, and shared out among
ranks by size. So the running statistics of one network may be those of different ranks.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from bncli.checkpoints.byte_source import MAX_READ, ByteSource, UnreadableFileError
from bncli.checkpoints.folder import Folder
from bncli.checkpoints.formats.inert_pickle import Global, Inert, OddKey, read_pickle
from bncli.checkpoints.formats.safetensors_file import parse_json, read_with_metadata
from bncli.checkpoints.formats.sharded_tensor import Chunk, join
from bncli.checkpoints.formats.torch_pickle import DTYPES, TorchMeanings
from bncli.checkpoints.formats.torch_zip import ZipArchive, read_torch_archive
from bncli.checkpoints.formats.zstandard_frame import decompress
from bncli.checkpoints.stored_tensor import MAX_DIMENSIONS, Storage, StoredTensor
from bncli.wording import list_names

KIND = "torch distributed"
METADATA = ".metadata"
MAX_METADATA = 256 * 2**20  # bytes
MAX_CHUNKS = 500_000  # of all tensors
MAX_AROUND = 2**16  # bytes that torch.save writes around a tensor's numbers
ZSTD = "stream.zstd/1"  # what torch notes of shards that it compressed
_OF_RANK = re.compile(r"__(\d{1,9})\.metadata")
_RANK = re.compile(r"(?:.*/)?__(\d{1,9})_\d+\.distcp|shard-(\d{1,9})-.*\.safetensors")
_SHARDING = "DCP_SHARDING_INFO"  # in the header of a safetensors file


def read_if_distributed(folder: Folder) -> tuple[str, object] | None:
    """What the directory holds, nested as it was saved; None for another directory.

    Raises:
        UnreadableFileError: on damage, and where a file is missing.
    """
    if METADATA in folder.names:
        return KIND, _read_metadata(folder, METADATA)
    ranks = sorted((int(match[1]), name) for name in folder.names if (match := _OF_RANK.fullmatch(name)))
    if ranks:
        return KIND, {f"rank{rank}": _read_metadata(folder, name) for rank, name in ranks}
    return _read_safetensors(folder)


def describe_ranks(tensors: Mapping[str, StoredTensor], layers: Iterable[str]) -> tuple[str, ...]:
    """Whose running statistics they are, where they are those of several ranks: a sentence, or none."""
    layers_of: dict[tuple[int, ...], list[str]] = {}
    for layer in layers:
        path = f"{layer}." if layer else ""
        found = (tensors.get(f"{path}{leaf}") for leaf in ("running_mean", "running_var"))
        ranks = tuple(rank for tensor in found if tensor is not None for rank in _rank_of(tensor))
        if ranks:
            own = ranks[:1] if len(set(ranks)) == 1 else ranks
            layers_of.setdefault(own, []).append(layer or "the top")
    if len(layers_of) < 2 and all(len(own) == 1 for own in layers_of):
        return ()
    parts = [
        f"{f'of rank {own[0]}' if len(own) == 1 else f'mean of rank {own[0]}, variance of {own[1]}'} in"
        f" {list_names(names, 4)}"
        for own, names in sorted(layers_of.items(), key=lambda one: (len(one[0]), one[0]))
    ]
    return (
        f"running statistics of different ranks: {'; '.join(parts)}. What all ranks hold is shared out among"
        " them by size, and their running statistics differ unless they were made equal before saving",
    )


def _rank_of(tensor: StoredTensor) -> Iterator[int]:
    """The rank that wrote a tensor; none of one that was cut into pieces on purpose."""
    match = _RANK.match(tensor.storage.name)
    if match and " " not in tensor.storage.name:
        yield int(match[1] or int(match[2]) - 1)  # safetensors files count from 1


# ---- .metadata and .distcp


def _read_metadata(folder: Folder, name: str) -> dict[str, object]:
    """The tensors of one network, nested as their paths tell."""
    file = folder.open(name)
    if file.size > MAX_METADATA:
        raise UnreadableFileError(f"its {name} has {file.size:,} bytes; bncli reads up to {MAX_METADATA:,}")
    with file.stream() as stream:
        content = _attributes(read_pickle(stream, TorchMeanings(_no_storage)), "Metadata")
    described, stored = content.get("state_dict_metadata"), content.get("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise UnreadableFileError(f"a damaged file: {name} is no metadata of torch.distributed.checkpoint")
    shards = _Shards(folder)
    places = _places(stored)
    num_chunks = 0
    tensors: dict[str, StoredTensor] = {}
    for key, entry in described.items():
        if not isinstance(entry, Inert) or entry.kind is None or entry.kind.name != "TensorStorageMetadata":
            continue  # a plain value
        said = entry.attributes
        dtype, shape = _dtype(said.get("properties")), _sizes(said.get("size"))
        pieces = said.get("chunks")
        if not isinstance(pieces, list):
            raise _damaged(str(key))
        num_chunks += len(pieces)
        if num_chunks > MAX_CHUNKS:
            raise UnreadableFileError(f"a network in more than {MAX_CHUNKS:,} pieces")
        if dtype is None:  # a type that BatchNorm has not
            continue
        chunks = []
        for piece in pieces:
            about = _attributes(piece, "ChunkStorageMetadata")
            offsets, sizes = _sizes(about.get("offsets")), _sizes(about.get("sizes"))
            place = places.get((str(key), offsets))
            if place is None:
                raise UnreadableFileError(f"a damaged file: {name} does not say where {str(key)[:80]} lies")
            limit = math.prod(sizes) * dtype.itemsize + MAX_AROUND
            name_of = f"{place.file}@{place.offset}"
            chunks.append(Chunk(offsets, sizes, name_of, partial(shards.tensor, place, limit)))
        tensors[str(key)] = join(shape, dtype, chunks)
    return _nested(tensors, content.get("planner_data"))


class Place(NamedTuple):
    """Where a chunk lies."""

    file: str
    offset: int
    length: int  # bytes in the file
    is_compressed: bool


def _places(stored: Mapping[Any, object]) -> dict[tuple[str, tuple[int, ...]], Place]:
    """Where each chunk lies, by the name of its tensor and its offsets in it."""
    found = {}
    for key, entry in stored.items():
        index = _attributes(key.value if isinstance(key, OddKey) else None, "MetadataIndex")
        about = _attributes(entry, "_StorageInfo")
        name, offsets = index.get("fqn"), index.get("offset")
        if not isinstance(name, str) or offsets is None:  # of a plain value
            continue
        file, start, length = about.get("relative_path"), about.get("offset"), about.get("length")
        if not isinstance(file, str) or not _is_size(start) or not _is_size(length):
            raise _damaged(name)
        transforms = about.get("transform_descriptors") or []
        if transforms not in ([], [ZSTD]):
            raise UnreadableFileError(
                "its shards are transformed by an extension of torch.distributed.checkpoint that bncli does"
                f" not know ({str(transforms)[:80]})"
            )
        found[name, _sizes(offsets)] = Place(file, start, length, bool(transforms))  # type: ignore[arg-type]
    _check_apart(found.values())
    return found


def _check_apart(places: Iterable[Place]) -> None:
    """Raise UnreadableFileError for pieces that share bytes: a few of them could be read for ever."""
    end, last = 0, ""
    for name, start, length, _ in sorted(places):
        if name == last and start < end:
            raise UnreadableFileError(f"a damaged file: pieces in {name[:80]} overlap")
        last, end = name, start + length


class _Shards:
    """Pieces of shards; files are opened when they are read."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._files: dict[str, ByteSource] = {}
        self._last: tuple[Place, StoredTensor] | None = None  # a large one is read bit by bit

    def tensor(self, place: Place, limit: int) -> StoredTensor:
        """What torch.save wrote at a place, of no more than `limit` bytes where it is compressed."""
        name, start, length, is_compressed = place
        if self._last is not None and self._last[0] == place:
            return self._last[1]
        if name not in self._files:
            self._files[name] = self._folder.reopened(name)
        file = self._files[name]
        if start + length > file.size:
            raise UnreadableFileError(f"a damaged or truncated file: {name[:80]} ends before what it holds")
        inside = f"{file.name}@{start}"
        if is_compressed:
            if max(length, limit) > MAX_READ:
                raise UnreadableFileError(
                    f"a compressed piece of more than {MAX_READ:,} bytes, which bncli does not expand"
                )
            content = decompress(file.read_at(start, length), limit)
            part = ByteSource(inside, len(content), lambda first, size: content[first : first + size])
        else:
            part = ByteSource(inside, length, lambda first, size: file.read_at(start + first, size))
        _, found = read_torch_archive(ZipArchive(part, strictly=False))
        if not isinstance(found, StoredTensor):
            raise UnreadableFileError(f"a damaged file: {name[:80]} holds no tensor where it should")
        self._last = (place, found)
        return found


def _nested(tensors: dict[str, StoredTensor], paths: object) -> dict[str, object]:
    """As they were saved: the planner notes the path of each flat name, in the order of the state dict.

    The tensors themselves come in the order of the ranks that wrote them.
    """
    known = paths if isinstance(paths, dict) else {}
    nested: dict[str, object] = {}
    for name in dict.fromkeys([*(str(name) for name in known), *tensors]):
        if name not in tensors:
            continue
        path = known.get(name)
        keys = [str(key) for key in path] if isinstance(path, tuple) and 0 < len(path) < 20 else [name]
        place: dict[str, object] = nested
        for key in keys[:-1]:
            below = place.setdefault(key, {})
            if not isinstance(below, dict):
                raise _damaged(name)
            place = below
        place[keys[-1]] = tensors[name]
    return nested


def _attributes(value: object, kind: str) -> dict[str, object]:
    if not isinstance(value, Inert) or value.kind is None or value.kind.name != kind:
        raise UnreadableFileError(
            f"a damaged file: its metadata has no {kind} of torch.distributed.checkpoint where it should"
        )
    return value.attributes


def _dtype(properties: object) -> torch.dtype | None:
    state = properties.state if isinstance(properties, Inert) else None
    kind = state[0] if isinstance(state, tuple) and state else None
    return DTYPES.get(kind.name) if isinstance(kind, Global) and kind.module == "torch" else None


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_DIMENSIONS or not all(map(_is_size, value)):
        raise UnreadableFileError("a damaged file: a tensor without a proper shape")
    return tuple(value)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _damaged(name: str) -> UnreadableFileError:
    return UnreadableFileError(f"a damaged file: what is said of {name[:80]} makes no sense")


def _no_storage(*_: object) -> Storage:
    raise UnreadableFileError("a damaged file: metadata with numbers of tensors in it")


# ---- safetensors of several ranks


def _read_safetensors(folder: Folder) -> tuple[str, object] | None:
    """Tensors in the safetensors files of the directory, where these say that they hold pieces."""
    names = sorted(name for name in folder.names if "/" not in name and name.endswith(".safetensors"))
    if not any(_RANK.fullmatch(name) for name in names):
        return None
    pieces: dict[str, list[Chunk]] = {}
    kinds: dict[str, torch.dtype] = {}
    for name in names:
        tensors, said = read_with_metadata(folder.reopened(name))
        sharding = said.get(_SHARDING)
        if not isinstance(sharding, str):
            return None
        offsets_of = parse_json(sharding.encode())
        for key, tensor in tensors.items():
            about = offsets_of.get(key)
            offsets = _sizes(about.get("saved_offsets") if isinstance(about, dict) else None)
            if kinds.setdefault(key, tensor.dtype) != tensor.dtype or len(offsets) != len(tensor.shape):
                raise _damaged(key)
            chunk = Chunk(offsets, tensor.shape, f"{name.replace(' ', '_')}@{key}", partial(_itself, tensor))
            pieces.setdefault(key, []).append(chunk)
    joined = {}
    for key, chunks in pieces.items():
        ends = [
            [offset + size for offset, size in zip(one.offsets, one.sizes, strict=True)] for one in chunks
        ]
        if len({len(end) for end in ends}) != 1:
            raise _damaged(key)
        joined[key] = join(tuple(map(max, zip(*ends, strict=True))), kinds[key], chunks)
    return KIND, joined


def _itself(tensor: StoredTensor) -> StoredTensor:
    return tensor
