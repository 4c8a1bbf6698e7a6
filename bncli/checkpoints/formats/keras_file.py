"""The containers of Keras: a zip archive, a folder with the same files, HDF5 by itself."""

import re
import zipfile
from collections.abc import Callable
from dataclasses import replace

from bncli.checkpoints.byte_source import ByteSource, ForeignFileError
from bncli.checkpoints.folder import Folder
from bncli.checkpoints.formats.beside import read_beside
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.hdf5 import Hdf5File
from bncli.checkpoints.formats.keras_layers import read_keras, read_legacy, read_weights
from bncli.checkpoints.formats.safetensors_file import parse_json
from bncli.checkpoints.formats.shard_index import MAX_INDEX, check_beside
from bncli.checkpoints.formats.torch_zip import ZipArchive

WEIGHTS, CONFIG, METADATA = "model.weights.h5", "config.json", "metadata.json"
_SHARD = re.compile(r"(.+)_\d{5}\.weights\.h5")
_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def read_if_keras_zip(archive: ZipArchive) -> tuple[str, ForeignNetwork] | None:
    """A `.keras` file; None for another zip archive.

    Raises:
        UnreadableFileError: on damage.
    """
    info = archive.entries.get(WEIGHTS)
    return None if info is None else ("keras", _read_zip(archive, info))


def read_if_hdf5(file: ByteSource, start: bytes) -> tuple[str, ForeignNetwork] | None:
    """A `.h5` or `.weights.h5` file; None for a file that does not start as HDF5.

    Raises:
        UnreadableFileError: on damage, when Keras did not write it, and for a shard beside its index.
    """
    if not start.startswith(_SIGNATURE):
        return None
    content = Hdf5File(file)
    legacy = read_legacy(content)
    if legacy is not None:
        return "keras h5", legacy
    own = file.name.replace("\\", "/").rpartition("/")[2]
    shard = _SHARD.fullmatch(own)
    if shard is None:
        return "keras h5", read_weights([content])
    index = f"{shard[1]}.weights.json"
    said = read_beside(file, index, MAX_INDEX)
    if said is not None and own.encode() in said:
        raise ForeignFileError(
            f"one of several files of a network; give {index}, as a layer may be divided between two of them"
        )
    network = read_weights([content])
    note = (
        f"named as one of several files: if it is, give their {index}, as a layer may be divided between two"
        " of them, and then its numbers are wrong here"
    )
    return "keras h5", replace(network, notes=(*network.notes, note))


def read_if_keras_folder(folder: Folder) -> tuple[str, ForeignNetwork] | None:
    """What `model.save(zipped=False)` leaves, or the shards of one network; None for another directory.

    Raises:
        UnreadableFileError: on damage.
    """
    if not {WEIGHTS, CONFIG} <= folder.names:
        indexes = [name for name in folder.names if "/" not in name and name.endswith(".weights.json")]
        if len(indexes) != 1:
            return None
        index = folder.open(indexes[0])
        return read_if_keras_shards(index, index.read_at(0, min(index.size, 300)), folder.open)
    said = [parse_json(folder.read(name)) if name in folder.names else None for name in (CONFIG, METADATA)]
    return "keras folder", read_keras(Hdf5File(folder.open(WEIGHTS)), *said)


def read_if_keras_shards(
    file: ByteSource, start: bytes, open_beside: Callable[[str], ByteSource]
) -> tuple[str, ForeignNetwork] | None:
    """A `.weights.json` with the `.weights.h5` files that it names beside it; None for another file.

    Raises:
        UnreadableFileError: on damage, and when it names a file elsewhere.
    """
    if start.lstrip()[:1] != b"{" or not file.size <= MAX_INDEX:
        return None
    content = file.read_at(0, file.size)
    if b".weights.h5" not in content:
        return None
    weight_map = parse_json(content).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(files, list) for files in weight_map.values()):
        return None
    names = {str(name): group for group, files in weight_map.items() for name in files}
    check_beside(names)
    return "keras shards", read_weights([Hdf5File(open_beside(name)) for name in names])


def _read_zip(archive: ZipArchive, info: zipfile.ZipInfo) -> ForeignNetwork:
    said = {}
    for name in (CONFIG, METADATA):
        entry = archive.entries.get(name)
        if entry is not None:
            with archive.stream(entry) as stream:
                said[name] = parse_json(stream.read())
    if info.compress_type == zipfile.ZIP_STORED:  # as Keras writes it: read where it lies
        weights = Hdf5File(archive.source, archive.position(info), info.file_size)
    else:
        with archive.stream(info) as stream:
            content = stream.read()
        source = ByteSource(WEIGHTS, len(content), lambda start, size: content[start : start + size])
        weights = Hdf5File(source)
    return read_keras(weights, said.get(CONFIG), said.get(METADATA))
