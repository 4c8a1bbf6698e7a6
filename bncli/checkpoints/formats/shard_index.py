"""A network in several files: `model.safetensors.index.json` and `pytorch_model.bin.index.json`.

The index is JSON: `weight_map` tells for every tensor the file that holds it, beside the index.
"""

from collections.abc import Callable, Mapping

from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.formats.safetensors_file import parse_json
from bncli.checkpoints.stored_tensor import StoredTensor

MAX_INDEX = 16 * 2**20  # bytes, as for a safetensors header
MAX_FILES = 1000


def read_index(data: bytes, read_shard: Callable[[str], Mapping[str, object]]) -> dict[str, StoredTensor]:
    """The tensors of all shards by name, in the order of the index; `read_shard(file name)` opens one.

    Raises:
        UnreadableFileError: when it is no index, names a file elsewhere, or a tensor is missing.
    """
    weight_map = parse_json(data).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UnreadableFileError("not a checkpoint: JSON, but no index of shards (it has no weight_map)")
    names = dict.fromkeys(name for name in weight_map.values() if isinstance(name, str))
    if len(names) > MAX_FILES:
        raise UnreadableFileError(f"an index of {len(names):,} files; bncli reads up to {MAX_FILES:,}")
    for name in names:
        # a stranger's index must not make us read any file it likes
        if not name or name in (".", "..") or any(char in name for char in "/\\:\0"):
            raise UnreadableFileError(f"its index names a file that is not beside it: {name[:80]!r}")
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
