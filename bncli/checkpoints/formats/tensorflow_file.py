"""The files of TensorFlow: a SavedModel's directory, a directory of checkpoints, or one file of either.

saved_model.pb  keras_metadata.pb  variables/variables.index  variables/variables.data-00000-of-00001
checkpoint  ck-1.index  ck-1.data-00000-of-00001  ck-1.meta (TensorFlow 1)
"""

import re
from collections.abc import Callable

from bncli.checkpoints.byte_source import MAX_READ, ByteSource, ForeignFileError, UnreadableFileError
from bncli.checkpoints.folder import Folder
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.protobuf import fields, inside, text
from bncli.checkpoints.formats.tensorflow_bundle import Bundle, is_index
from bncli.checkpoints.formats.tensorflow_first import FirstFormat, is_first_format
from bncli.checkpoints.formats.tensorflow_layers import parse_metadata, parse_old_metadata, read_layers
from bncli.errors import CheckpointError

SAVED_MODEL, KERAS_METADATA, VARIABLES = "saved_model.pb", "keras_metadata.pb", "variables/variables"
_NEWEST = re.compile(r'^model_checkpoint_path: "([^"\n]*)"', re.MULTILINE)
_PART = re.compile(r"/part_\d+$")  # of a variable that is divided
_VARIABLE_OPS = {"VarHandleOp", "VariableV2", "Variable"}
Open = Callable[[str], ByteSource]


def read_if_tensorflow_file(
    file: ByteSource, start: bytes, open_beside: Open
) -> tuple[str, ForeignNetwork] | None:
    """An `.index` file, or a saved_model.pb with its variables beside it; None for another file.

    Raises:
        UnreadableFileError: on damage.
    """
    if start[:2] == b"\0\0" and is_index(file):
        prefix = file.name.replace("\\", "/").rpartition("/")[2].removesuffix(".index")
        return "tensorflow checkpoint", _read(file, prefix, open_beside)
    if start[:3] == b"\x08\x01\x12" and file.name.endswith(SAVED_MODEL):
        index = _open_if_there(open_beside, f"{VARIABLES}.index")
        if index is not None:
            return "tensorflow savedmodel", _read(index, VARIABLES, open_beside)
    return None


def read_if_tensorflow_folder(folder: Folder) -> tuple[str, ForeignNetwork] | None:
    """A SavedModel, or checkpoints of which the newest is read; None for another directory.

    Raises:
        UnreadableFileError: on damage, and where nothing tells which checkpoint is meant.
    """
    names = folder.names
    if f"{VARIABLES}.index" in names:  # beside saved_model.pb, or .pbtxt, or .cpb of a large graph
        return "tensorflow savedmodel", _read(folder.open(f"{VARIABLES}.index"), VARIABLES, folder.open)
    prefixes = sorted(name.removesuffix(".index") for name in names if re.fullmatch(r"[^/]*\.index", name))
    prefixes = [prefix for prefix in prefixes if any(name.startswith(f"{prefix}.data-") for name in names)]
    if not prefixes:
        return None
    prefix = prefixes[0]
    if len(prefixes) > 1:
        said = folder.read("checkpoint", 2**20).decode("utf-8", "replace") if "checkpoint" in names else ""
        newest = _NEWEST.search(said)
        # a path of the machine that wrote it; only its last part counts here
        prefix = newest.group(1).replace("\\", "/").rpartition("/")[2] if newest else ""
        if prefix not in prefixes:
            listed = ", ".join(f"{name}.index" for name in prefixes[:3])
            raise ForeignFileError(
                f"a directory of {len(prefixes)} TensorFlow checkpoints; give one: {listed}"
            )
    return "tensorflow checkpoint", _read(folder.open(f"{prefix}.index"), prefix, folder.open)


def _read(index: ByteSource, prefix: str, open_beside: Open) -> ForeignNetwork:
    """The checkpoint of an open index; `prefix` is its name without `.index`, as `open_beside` knows it."""
    bundle: Bundle | FirstFormat
    if is_first_format(index):
        bundle = FirstFormat(index)
    else:
        bundle = Bundle(index, lambda ending: open_beside(f"{prefix}{ending}"))
    has_objects = bundle.object_graph() is not None
    configs, order = {}, {}
    if prefix == VARIABLES:
        saved_model = _open_if_there(open_beside, SAVED_MODEL)
        if has_objects:
            configs = _configs(_open_if_there(open_beside, KERAS_METADATA), saved_model)
        else:
            order = _order(saved_model, is_saved_model=True)
    elif not has_objects:
        order = _order(_open_if_there(open_beside, f"{prefix}.meta"), is_saved_model=False)
    return read_layers(bundle, configs, order)


def _configs(metadata: ByteSource | None, saved_model: ByteSource | None) -> dict[int, object]:
    """What Keras says of its layers, by the number of the object."""
    if metadata is not None:
        return parse_metadata(metadata.read_at(0, metadata.size))
    if saved_model is None or saved_model.size > MAX_READ:
        return {}
    return parse_old_metadata(saved_model.read_at(0, saved_model.size))


def _open_if_there(open_beside: Open, name: str) -> ByteSource | None:
    try:
        return open_beside(name)
    except (CheckpointError, UnreadableFileError):
        return None


def _order(graph: ByteSource | None, *, is_saved_model: bool) -> dict[str, int]:
    """The place of each variable in a graph of TensorFlow 1: its operations are in the order of creation."""
    if graph is None or graph.size > MAX_READ:
        return {}
    path = (2, 2, 1) if is_saved_model else (2, 1)  # meta graph, graph, operation
    order: dict[str, int] = {}
    for operation in inside([graph.read_at(0, graph.size)], *path):
        name = kind = ""
        for number, part in fields(operation):
            if number == 1:
                name = text(part)
            elif number == 2:
                kind = text(part)
                break
        if kind in _VARIABLE_OPS:
            order.setdefault(_PART.sub("", name), len(order))
    return order
