"""A network in several files: `model.safetensors.index.json` and `pytorch_model.bin.index.json`.

The index is JSON: `weight_map` tells for every tensor the file that holds it, beside the index.
"""

import re
from collections.abc import Callable, Mapping

from bncli.checkpoints.byte_source import ByteSource, ForeignFileError, UnreadableFileError
from bncli.checkpoints.formats.foreign import recognise_json, recognise_name
from bncli.checkpoints.formats.safetensors_file import parse_json
from bncli.checkpoints.stored_tensor import StoredTensor

MAX_INDEX = 16 * 2**20  # bytes, as for a safetensors header
MAX_FILES = 1000
# letters, digits and what such names have between them: nothing that leads elsewhere in a path or a URL
PLAIN_NAME = re.compile(r"[\w.+=@ ()-]+")


def read_index(
    source: ByteSource, read_shard: Callable[[str], Mapping[str, object]]
) -> dict[str, StoredTensor]:
    """The tensors of all shards by name, in the order of the index; `read_shard(file name)` opens one.

    Raises:
        UnreadableFileError: when it is no index, names a file elsewhere, or a tensor is missing.
    """
    if source.size > MAX_INDEX:
        raise UnreadableFileError(f"not a checkpoint: text of {source.size:,} bytes")
    try:
        content = parse_json(source.read_at(0, source.size))
    except UnreadableFileError:
        known = recognise_name(source.name)
        if known:
            raise ForeignFileError(known.sentence) from None
        raise UnreadableFileError(
            "not a checkpoint: text that begins like JSON, and is no index of shards"
        ) from None
    weight_map = content.get("weight_map")
    known = recognise_json(content)
    if known:
        raise ForeignFileError(known.sentence)
    if not isinstance(weight_map, dict):
        raise ForeignFileError("not a checkpoint: JSON, but no index of shards (it has no weight_map)")
    names = dict.fromkeys(name for name in weight_map.values() if isinstance(name, str))
    check_beside({file: name for name, file in reversed(weight_map.items()) if file in names})
    shards = {name: read_shard(name) for name in names}
    tensors = {}
    for name, file in weight_map.items():
        tensor = shards[file].get(name) if isinstance(file, str) else None
        if not isinstance(tensor, StoredTensor):
            raise UnreadableFileError(
                f"tensor {name[:80]} is not in {str(file)[:80]}, where its index says it is"
            )
        tensors[name] = tensor
    return tensors


def check_beside(names: Mapping[str, str]) -> None:
    """Whether all are plain names of files, given with a tensor that each is named for.

    A stranger's index must not make us read any file or call any server it likes.

    Raises:
        UnreadableFileError: when one is not, or there are far too many.
    """
    if len(names) > MAX_FILES:
        raise UnreadableFileError(f"an index of {len(names):,} files; bncli reads up to {MAX_FILES:,}")
    for name, tensor in names.items():
        if not PLAIN_NAME.fullmatch(name) or not name.strip("."):
            raise UnreadableFileError(
                f"its index names {name[:80]!r} for tensor {tensor[:80]!r}, which is no plain name of a file"
                " beside it; bncli opens no other"
            )


def place_beside(index: str, name: str) -> str:
    """The path or URL of the file of that name in the folder where the index lies.

    Of a chain of URLs (`zip://a/model.index.json::https://host/b.zip`) the first place is the index's own.
    What follows a `?` in a web address is no part of the folder.
    """
    links = index.split("::")
    place = next((position for position, link in enumerate(links) if "://" in link), 0)
    own = links[place]
    if own.startswith(("http://", "https://")):
        own = own.partition("?")[0].partition("#")[0]
    links[place] = f"{own.rpartition('/')[0]}/{name}" if "/" in own else name
    return "::".join(links)
