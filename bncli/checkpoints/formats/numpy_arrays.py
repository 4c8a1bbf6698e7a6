"""Arrays of NumPy under names: `.npz` archives, and pickles of dicts with arrays.

Of Chainer and MLX, of PaddlePaddle (`.pdparams`) and of detectron2's model zoo (`{"model": {...}}`).
Nothing is unpickled; numbers stay where they lie.
"""

import zipfile
from dataclasses import replace
from functools import partial

import torch

from bncli.batchnorm.conventions import CHAINER
from bncli.batchnorm.state_dict import batch_norm_names
from bncli.checkpoints.byte_source import ByteSource, ForeignFileError, UnreadableFileError
from bncli.checkpoints.formats import haiku_file
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.named_arrays import in_order, is_merged_by_caffe2, recognise, with_dots
from bncli.checkpoints.formats.npy import array_tensor, read_header
from bncli.checkpoints.formats.numpy_pickle import read_arrays
from bncli.checkpoints.formats.torch_zip import ZipArchive
from bncli.checkpoints.stored_tensor import Storage, StoredTensor, stored_tensor
from bncli.wording import list_names, plural

_MAGIC_OF_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_HEAD = 4096  # bytes of a compressed array that are unpacked to see its header


def read_if_npz(archive: ZipArchive) -> tuple[str, object] | None:
    """Named arrays with BatchNorm among them; None for another archive.

    The trees of Haiku and Flax are looked for first: the names in them say more.

    Raises:
        UnreadableFileError: on damage.
    """
    names = list(archive.entries)
    if not names or not all(name.endswith(".npy") for name in names):
        return None
    tree = haiku_file.read_npz(archive, names)
    if tree is not None:
        return tree
    tensors, uncalled = {}, []
    for name in names:
        tensor = _entry(archive, archive.entries[name])
        if tensor is not None:
            tensors[name.removesuffix(".npy")] = tensor
        elif name.endswith(f"/{CHAINER.running_mean}.npy"):
            uncalled.append(name.rpartition("/")[0].replace("/", "."))
    network = _network(tensors, "npz")
    if not uncalled:
        return network
    layers, have = plural(len(uncalled), "layer"), "has" if len(uncalled) == 1 else "have"
    note = f"{layers} ({list_names(uncalled)}) {have} no numbers: Chainer makes them in a layer's first call"
    if network is None:
        raise ForeignFileError(f"a file of Chainer, in which {note}")
    kind, content = network
    if isinstance(content, ForeignNetwork):
        content = replace(content, notes=(*content.notes, note))
    return kind, content


def _entry(archive: ZipArchive, info: zipfile.ZipInfo) -> StoredTensor | None:
    """An array of the archive; None for one of objects, and of a type that bncli does not read."""
    size = info.file_size
    if info.compress_type == zipfile.ZIP_STORED:
        start = archive.position(info)
        header = read_header(lambda first, count: archive.source.read_at(start + first, count), size)
    else:
        head = archive.head(info, min(size, _HEAD))
        header = read_header(lambda first, count: head[first : first + count], size)
    read = partial(archive.read, info)
    length = header.length
    return array_tensor(
        header, Storage(header.size, lambda first, count: read(length + first, count), info.filename)
    )


def read_if_pickle(file: ByteSource, start: bytes) -> tuple[str, object] | None:
    """A pickle with arrays and BatchNorm among them; None for another, and for one that is damaged.

    The trees of Haiku and Flax are looked for first here too.

    Raises:
        UnreadableFileError: on damage of its arrays.
    """
    if start[:1] != b"\x80" or len(start) < 2 or not 2 <= start[1] <= 5 or start.startswith(_MAGIC_OF_TORCH):
        return None
    with file.stream() as stream:
        try:
            leaves = list(read_arrays(stream, file.read_at))
        except UnreadableFileError:
            return None
    tree = haiku_file.network_of(dict(leaves), "pickle")
    if tree is not None:
        return tree
    places: dict[tuple[str, ...], dict[str, StoredTensor]] = {}
    for path, tensor in leaves:
        # PaddlePaddle keeps (name, array) in what is nested
        names = path[:-1] if len(path) > 1 and path[-1] == "1" else path
        if names:
            places.setdefault(names[:-1], {})[names[-1]] = tensor
    found = [(place, _network(tensors, "pickle")) for place, tensors in places.items()]
    known = [(place, network) for place, network in found if network is not None]
    if not known:
        if any(is_merged_by_caffe2(tensors) for tensors in places.values()):
            raise ForeignFileError(
                "a pickle of Caffe2 (Detectron) in which BatchNorm is only a scale and a bias of each"
                " channel: mean and variance were multiplied into them, and can no longer be told"
            )
        return None
    if len(known) == 1:
        return known[0][1]
    return max((network for _, network in known), key=lambda network: _num_layers(network[1]))


def _num_layers(content: object) -> int:
    layers = getattr(content, "layers", None)
    if layers is not None:
        return len(layers)
    return len(batch_norm_names(content)) if isinstance(content, dict) else 0


def _network(tensors: dict[str, StoredTensor], kind: str) -> tuple[str, object] | None:
    """A network of the framework that has such names, or a state dict where they are PyTorch's."""
    is_paddle = any(name == "_mean" or name.endswith("._mean") for name in tensors)
    has_bare = is_paddle and any(tensor.dtype == torch.uint16 for tensor in tensors.values())
    if has_bare:
        tensors = {name: _as_bfloat16(tensor) for name, tensor in tensors.items()}
    found = recognise(tensors)
    if found is not None:
        if has_bare:
            found.notes.append("uint16 in it is read as bfloat16, as PaddlePaddle stores it")
        framework = next(iter(found.layers.values())).convention.framework
        return f"{framework.lower()} {kind}", found.network()
    dotted = in_order(with_dots(tensors))
    return (f"numpy {kind}", dotted) if batch_norm_names(dotted) else None


def _as_bfloat16(tensor: StoredTensor) -> StoredTensor:
    """An array of 16 bits as PaddlePaddle means it; there is no other trace of bfloat16 in its files."""
    if tensor.dtype != torch.uint16:
        return tensor
    return stored_tensor(tensor.storage, torch.bfloat16, tensor.offset, tensor.shape, tensor.stride)
