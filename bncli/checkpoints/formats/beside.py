"""Files that belong to a model and lie beside it: shards, external data, the description of a network.

Only a plain name is looked for, in the folder of the model. A link is followed no further than to where the
model itself lies (caches such as Hugging Face's keep both as links into one folder).
"""

import os
from functools import partial
from pathlib import Path

from bncli.checkpoints.byte_source import MAX_READ, ByteSource, UnreadableFileError, open_source
from bncli.checkpoints.formats.shard_index import PLAIN_NAME, place_beside
from bncli.checkpoints.stored_tensor import Storage
from bncli.errors import CheckpointError


def storage_beside(model: ByteSource, name: str, offset: int, size: int | None) -> Storage:
    """A range of a file beside the model, which is opened whenever some of it is read.

    `size` None is the rest of the file.

    Raises:
        UnreadableFileError: when the name leads elsewhere, or the file is not there or too short.
    """
    path = _place(model, name)
    total = _size_of(path, name)
    size = total - offset if size is None else size
    if offset < 0 or size < 0 or offset + size > total:
        raise UnreadableFileError(f"a damaged file: {name[:80]} beside it ends before a tensor that it holds")
    return Storage(size, partial(_read, path, name, offset), f"{name}@{offset}")


def read_beside(model: ByteSource, name: str, limit: int = MAX_READ) -> bytes | None:
    """The content of a small file beside the model; None where there is none."""
    try:
        path = _place(model, name)
        with open_source(path) as file:
            return file.read_at(0, file.size) if file.size <= limit else None
    except (UnreadableFileError, CheckpointError):
        return None


def linked_place(model: str, name: str) -> str:
    """The path or URL of a file beside the model at a path or URL; `name` is a plain one.

    Raises:
        UnreadableFileError: for a link that leads elsewhere.
    """
    path = place_beside(model, name)
    if "://" not in path:
        own = Path(model)
        folders = (os.path.realpath(own.parent), os.path.dirname(os.path.realpath(own)))  # noqa: PTH120
        if not any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in folders):
            raise UnreadableFileError(
                f"{name[:80]} beside it is a link that leads elsewhere; bncli follows none"
            )
    return path


def _place(model: ByteSource, name: str) -> str:
    parts = name.removeprefix("./").split("/")
    if len(name) > 1000 or not all(PLAIN_NAME.fullmatch(part) and part.strip(".") for part in parts):
        raise UnreadableFileError(
            f"its numbers are said to lie in {name[:80]!r}, which is no plain name of a file beside it;"
            " bncli opens no other"
        )
    return linked_place(model.name, "/".join(parts))


def _size_of(path: str, name: str) -> int:
    try:
        with open_source(path) as file:
            return file.size
    except (UnreadableFileError, CheckpointError):
        raise UnreadableFileError(
            f"its numbers lie in {name[:80]}, which is not beside it; put it there"
        ) from None


def _read(path: str, name: str, offset: int, start: int, size: int) -> bytes:
    try:
        with open_source(path) as file:
            return file.read_at(offset + start, size)
    except CheckpointError:
        raise UnreadableFileError(f"{name[:80]} beside it can no longer be read") from None
