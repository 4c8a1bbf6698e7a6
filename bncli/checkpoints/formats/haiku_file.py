"""Parameters and state of Haiku (and trees of Flax) as people save them by hand: a pickle, `.npz`, `.npy`.

Neither library has a file of its own for that. In a pickle lie two dicts, or both in a tuple, list or dict.
In `.npz` either each is pickled again, or every array has a name joined of its keys, a sign between them.
"""

import re
from collections.abc import Iterator
from functools import partial

from bncli.batchnorm.conventions import HAIKU
from bncli.checkpoints.byte_source import ByteSource, UnreadableFileError
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.jax_tree import STATISTICS, Path, read_tree
from bncli.checkpoints.formats.npy import OBJECTS, SIGNATURE, array_tensor, read_header
from bncli.checkpoints.formats.numpy_pickle import read_arrays
from bncli.checkpoints.formats.torch_zip import ZipArchive
from bncli.checkpoints.stored_tensor import Storage, StoredTensor

MAX_PICKLED = 16  # dicts in one archive
# what the names of Haiku and of Flax have in them, whatever is between the keys
_HAIKU = re.compile(r"/~/mean_ema(?P<sign>[^A-Za-z0-9_]+|__)(?:average|hidden|counter)$")
_FLAX = re.compile(r"(?:^|[/.])batch_stats(?P<sign>[/.])")
_COLLECTION = re.compile(r"((?:\w+_)?(?:params|state|ema))(?:[/.|:]+|__)(.+)")


def read_if_npy(file: ByteSource, start: bytes) -> tuple[str, ForeignNetwork] | None:
    """A dict that was saved as an array of objects; None for another file."""
    if not start.startswith(SIGNATURE):
        return None
    header = read_header(file.read_at, file.size)
    if header.kind != OBJECTS:
        return None
    read = partial(_read_from, file, header.length)
    with file.stream(header.length) as stream:
        return network_of(dict(read_arrays(stream, read)), "npy")


def _read_from(file: ByteSource, start: int, position: int, size: int) -> bytes:
    return file.read_at(start + position, size)


def read_npz(archive: ZipArchive, names: list[str]) -> tuple[str, ForeignNetwork] | None:
    """Arrays by name, or pickled dicts by name; None where they are of other frameworks.

    Raises:
        UnreadableFileError: on damage.
    """
    keys = [name.removesuffix(".npy") for name in names]
    sign = next((match["sign"] for key in keys if (match := _HAIKU.search(key))), None)
    flax = next((match["sign"] for key in keys if (match := _FLAX.search(key))), None)
    if not (sign or flax or _are_objects(archive, names)):
        return None
    leaves: dict[Path, StoredTensor] = {}
    for key in keys:
        path = _haiku_path(key, sign) if sign else tuple(key.split(flax)) if flax else (key,)
        leaves |= {(*path, *inner): tensor for inner, tensor in _entry(archive, f"{key}.npy")}
    return network_of(leaves, "npz")


def _are_objects(archive: ZipArchive, names: list[str]) -> bool:
    """Whether there are only a few entries, and the first is pickled."""
    info = archive.entries[names[0]]
    try:
        header = read_header(partial(archive.read, info), info.file_size)
    except UnreadableFileError:
        return False
    return len(names) <= MAX_PICKLED and header.kind == OBJECTS


def _haiku_path(key: str, sign: str) -> Path:
    """`state/net/~/batch_norm/~/mean_ema/average` in its keys: the name of a module has slashes itself."""
    module, _, leaf = key.rpartition(sign)
    match = _COLLECTION.fullmatch(module)
    return (match[1], match[2], leaf) if match else (module, leaf)


def _entry(archive: ZipArchive, name: str) -> Iterator[tuple[Path, StoredTensor]]:
    """The array of an entry, or what is pickled in it."""
    info = archive.entries[name]
    read = partial(archive.read, info)
    header = read_header(read, info.file_size)
    if header.kind == OBJECTS:
        with archive.stream(info) as stream:
            stream.seek(header.length)
            yield from read_arrays(stream, read)
        return
    storage = Storage(header.size, lambda start, size: read(header.length + start, size), name)
    tensor = array_tensor(header, storage)
    if tensor is not None:
        yield (), tensor


def network_of(leaves: dict[Path, StoredTensor], container: str) -> tuple[str, ForeignNetwork] | None:
    """What the arrays are; None where no BatchNorm of Haiku or Flax is among them."""
    network = read_tree(leaves)
    is_flax = any(STATISTICS in path for path in leaves)
    is_haiku = any(layer.convention is HAIKU for layer in network.layers.values())
    if not network.layers or not (is_haiku or is_flax):
        return None  # a mean and a variance alone may be those of anything
    return f"{'haiku' if is_haiku else 'flax'} {container}", network
