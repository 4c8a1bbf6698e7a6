"""Directories of Orbax: arrays of Zarr, each in a folder of its own or all in an OCDBT store.

`_METADATA` tells the path to each array. The names of folders join the keys of a path with dots and do not
escape any, so they cannot be divided again. Above, a CheckpointManager has directories STEP/ITEM.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from bncli.checkpoints.byte_source import MAX_READ_IN_ALL, UnreadableFileError
from bncli.checkpoints.folder import Folder
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.jax_tree import Path, read_tree
from bncli.checkpoints.formats.ocdbt import MANIFEST, Place, read_ocdbt
from bncli.checkpoints.formats.safetensors_file import MAX_HEADER, parse_json
from bncli.checkpoints.formats.zarr_array import VERSION_2, VERSION_3, zarr_tensor
from bncli.checkpoints.stored_tensor import StoredTensor
from bncli.wording import list_names

METADATA = "_METADATA"
WHOLE = "_CHECKPOINT_METADATA"  # beside it, or above the items of one checkpoint
MAX_DESCRIPTION = 2**16  # bytes of the JSON of one array
_UNFINISHED = ".orbax-checkpoint-tmp"
_STEP = re.compile(r"(?:[A-Za-z]+[_-]?)?(\d{1,18})")


@dataclass
class _Store:
    """The values of one directory by key, whichever way they are stored."""

    folder: Folder
    directory: str  # with a slash at its end, or ''
    values: Mapping[str, bytes | Place] | None  # of OCDBT; None where each value is a file
    num_read: int = field(default=0)

    def read(self, key: str, limit: int) -> bytes | None:
        """A value; None where there is none.

        Raises:
            UnreadableFileError: when it is larger than `limit` bytes.
        """
        if self.values is None:
            name = self.directory + key
            return self.folder.read(name, limit) if name in self.folder.names else None
        value = self.values.get(key)
        if value is None or isinstance(value, bytes):
            return value
        self.num_read += value.size
        if value.size > limit or self.num_read > MAX_READ_IN_ALL:
            raise UnreadableFileError(f"its {key[:100]} has {value.size:,} bytes; bncli reads {limit:,}")
        return self.folder.read_at(value.file, value.offset, value.size)


def read_if_orbax(folder: Folder) -> tuple[str, ForeignNetwork] | None:
    """A checkpoint of Orbax, or of a CheckpointManager the last step; None for another directory.

    Raises:
        UnreadableFileError: on damage.
    """
    found = sorted(_checkpoints(folder.names))
    if not found:
        return None
    items, step, notes = _last_step([directory.split("/")[:-1] for directory in found])
    _check_one(items, folder.names)
    leaves: dict[Path, StoredTensor] = {}
    for parts in items:
        prefix = tuple(parts[step:]) if len(items) > 1 else ()
        directory = "".join(f"{part}/" for part in parts)
        leaves |= {(*prefix, *path): tensor for path, tensor in _arrays(folder, directory)}
    network = read_tree(leaves)
    return "orbax", ForeignNetwork(network.tensors, network.layers, (*notes, *network.notes))


def _checkpoints(names: frozenset[str]) -> set[str]:
    """The directories that are checkpoints, each with a slash at its end, or ''."""
    found = set()
    for name in names:
        directory, _, last = name.rpartition("/")
        if last == METADATA and _UNFINISHED not in directory:
            found.add(f"{directory}/" if directory else "")
    return found


def _last_step(places: list[list[str]]) -> tuple[list[list[str]], int, tuple[str, ...]]:
    """The checkpoints of the last step, how many directories lead to their names, and what is to be said."""
    level = 0
    while True:
        firsts = {parts[level] for parts in places if len(parts) > level}
        if len(places) < 2 or any(len(parts) <= level for parts in places):
            return places, level, ()
        numbers = {first: _STEP.fullmatch(first) for first in firsts}
        if len(firsts) > 1:
            steps = {int(match[1]): first for first, match in numbers.items() if match}
            if len(steps) < len(firsts):
                return places, level, ()
            last = steps[max(steps)]
            others = ", ".join(steps[number] for number in sorted(steps)[:-1][-3:])
            chosen = [parts for parts in places if parts[level] == last]
            where = "/".join(chosen[0][: level + 1])
            note = f"there are {len(steps)} steps; this is the last, {where} (others: {others})"
            inner, depth, _ = _last_step(chosen) if len(chosen) > 1 else (chosen, level + 1, ())
            return inner, depth, (note,)
        level += 1


def _check_one(places: list[list[str]], names: frozenset[str]) -> None:
    """Raise UnreadableFileError unless these are the items of one checkpoint: each alone is none then."""
    paths = ["/".join(parts) for parts in places]
    whole = any(f"{path}/{WHOLE}" in names for path in paths)
    if len(paths) > 1 and (whole or len({tuple(parts[:-1]) for parts in places}) > 1):
        raise UnreadableFileError(
            f"{len(paths)} checkpoints of Orbax ({list_names(paths, 4)}); give the directory of one of them"
        )


def _arrays(folder: Folder, directory: str) -> Iterator[tuple[Path, StoredTensor]]:
    try:
        metadata = parse_json(folder.read(directory + METADATA, MAX_HEADER))
    except UnreadableFileError as error:
        raise UnreadableFileError(f"a damaged checkpoint: {directory}{METADATA}: {error}") from None
    tree = metadata.get("tree_metadata")
    if not isinstance(tree, dict):
        raise UnreadableFileError(f"a damaged checkpoint: there is no tree in {directory}{METADATA}")
    in_ocdbt = directory + MANIFEST in folder.names
    store = _Store(folder, directory, read_ocdbt(folder, directory) if in_ocdbt else None)
    for entry in tree.values():
        path = _path(entry)
        name = ".".join(path)
        for leaf in (VERSION_2, VERSION_3):
            description = store.read(f"{name}/{leaf}", MAX_DESCRIPTION)
            if description is not None:
                tensor = zarr_tensor(name, description, _chunks(store, name))
                if tensor is not None:
                    yield path, tensor
                break


def _chunks(store: _Store, name: str) -> Callable[[str, int], bytes | None]:
    return lambda key, limit: store.read(f"{name}/{key}", limit)


def _path(entry: object) -> Path:
    keys = entry.get("key_metadata") if isinstance(entry, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, dict) and "key" in key for key in keys):
        raise UnreadableFileError(f"a damaged checkpoint: a path in {METADATA} that is none")
    return tuple(str(key["key"]) for key in keys)
