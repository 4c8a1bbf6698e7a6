"""A checkpoint of anyone's, written again with other running statistics and nothing else changed.

The new file is a copy of the old one's bytes, in which those of the given buffers, and the checksums over
them, are replaced where they lie. So container, keys, prefixes, nesting, metadata, Python objects and every
other tensor stay what they are bit by bit, and nothing in the file is executed. It works on files of
`torch.save` (state dicts and whole modules, zip and the format before version 1.6), TorchScript and
safetensors. A zip archive's `.data/serialization_id`, which PyTorch only logs, stays that of the source.
"""

import difflib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from bncli.atomic_file import atomic_file
from bncli.batchnorm.bits import as_bytes
from bncli.batchnorm.state_dict import batch_norm_keys
from bncli.checkpoints.any_content import named, open_file, read_content, without_collector
from bncli.checkpoints.any_file import state_dicts_of
from bncli.checkpoints.byte_source import ByteSource, Patch, UnreadableFileError
from bncli.checkpoints.formats import exported_program
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.inert_pickle import Inert, parts_of
from bncli.checkpoints.formats.torch_pickle import UsesOfStorages
from bncli.checkpoints.formats.zip_checksums import patch_checksums
from bncli.checkpoints.locate import StateDict, choose
from bncli.checkpoints.own_config import FORMAT
from bncli.checkpoints.stored_tensor import Storage, StoredTensor, contiguous_stride
from bncli.checkpoints.weights import LoadedWeights
from bncli.wording import list_names

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def rewrite(
    source: str | Path,
    target: str | Path,
    new_buffers: Mapping[str, Tensor],
    key: str | None = None,
    *,
    any_tensor: bool = False,
) -> None:
    """Write a copy of a checkpoint in which BatchNorm buffers, or with `any_tensor` any, have new values.

    `new_buffers` has them by the names that the file gives them in the state dict (or module) under `key`,
    prefixes such as `module.` included: `OpenCheckpoint.prefix` and its names. They have the shapes of those
    in the file and are converted to their types, rounded where those are coarser. Without `key` the state
    dict is the one that `open_checkpoint` would choose. `target` is replaced atomically.

    Raises:
        CheckpointError: naming the file and what is wrong with it, or with the new buffers: an unknown name,
            another shape, a number that the file's type cannot hold, memory shared with what must not change.
            Nothing has been written then.
        OSError: when the target cannot be written; a former file of that name is intact.
    """
    source, target = str(source), Path(target)
    with ExitStack() as stack, named(source):
        file = open_file(source, stack)
        original = Path(source.removeprefix("file://"))
        if target.exists() and original.exists() and target.samefile(original):
            raise UnreadableFileError("is never changed itself; give another name for the new file")
        patches = _plan(file, stack, new_buffers, new_buffers, key, any_tensor=any_tensor)
        with atomic_file(target) as copy:
            file.copy_to(copy, patches)


def check_rewritable(
    source: str | Path, names: Iterable[str], key: str | None = None, *, any_tensor: bool = False
) -> None:
    """Check, before new values for these buffers are measured, that `rewrite` will take them.

    Raises:
        CheckpointError: as `rewrite` would for values that fit, naming the file.
    """
    with ExitStack() as stack, named(str(source)):
        _plan(open_file(str(source), stack), stack, list(names), None, key, any_tensor=any_tensor)


def statistics_in_file(model: nn.Module, loaded: LoadedWeights, layers: Collection[str]) -> dict[str, Tensor]:
    """Running means and variances of a loaded network's layers, by their names in the file: for `rewrite`.

    A layer that the network has under several names has all of them, as far as the file knows them.
    """
    modules = [model.get_submodule(layer) for layer in layers]
    wanted = {id(buffer) for module in modules for buffer in (module.running_mean, module.running_var)}
    # with keep_vars the state dict has the buffers themselves
    state = model.state_dict(keep_vars=True)
    return {
        loaded.names[name]: value
        for name, value in state.items()
        if id(value) in wanted and name in loaded.names
    }


def _plan(
    file: ByteSource,
    stack: ExitStack,
    names: Iterable[str],
    new_buffers: Mapping[str, Tensor] | None,
    key: str | None,
    *,
    any_tensor: bool,
) -> list[Patch]:
    """All that the copy has in other bytes than the file; without new values, those of the file."""
    uses = UsesOfStorages()
    with without_collector():
        kind, content = read_content(file, stack, uses.meanings)
    if kind.endswith("index"):
        raise UnreadableFileError("an index of several files; give the one of them that is to be changed")
    if kind == exported_program.KIND:
        raise UnreadableFileError("a program of torch.export, which is only read; export the network again")
    if isinstance(content, ForeignNetwork):
        raise UnreadableFileError(f"a file of another framework ({kind}), which is only read")
    if isinstance(content, dict) and content.get("format") == FORMAT:
        raise UnreadableFileError(
            "a checkpoint of bncli, whose digests would not fit any more; use load_checkpoint and"
            " save_checkpoint"
        )
    state_dict = choose(state_dicts_of(kind, content, file.name), key)
    changed = _find(state_dict, names, any_tensor=any_tensor)
    owners: dict[Patch, str] = {}
    for name, tensor in changed.items():
        values = (
            torch.zeros(tensor.shape, dtype=tensor.dtype)
            if new_buffers is None
            else _converted(name, new_buffers[name], tensor)
        )
        owners |= dict.fromkeys(_patches(name, tensor, values), name)
    patches = sorted(owners)  # a buffer that has two names is replaced once
    for first, second in pairwise(patches):
        if first.end > second.position:
            raise _shared(owners[first], owners[second], "would get different values")
    _check_bytes(owners, changed, uses, state_dict)
    _check_places(content, changed)
    return patches + (patch_checksums(file, patches) if kind in ("torch zip", "torchscript") else [])


def _find(state_dict: StateDict, names: Iterable[str], *, any_tensor: bool) -> dict[str, StoredTensor]:
    """The tensors to be changed, by name.

    Raises:
        UnreadableFileError: for a name that is none of a BatchNorm layer's buffers, or none at all.
    """
    buffers = {
        found: state_dict.tensors[found]
        for layer in state_dict.layer_names
        for leaf, found in batch_norm_keys(state_dict.tensors, layer).items()
        if leaf in BUFFERS
    }
    if any_tensor:
        buffers = dict(state_dict.tensors)
    names = list(names)
    unknown = [name for name in names if name not in buffers]
    if not unknown:
        return {name: buffers[name] for name in names}
    where = f" under {state_dict.key!r}" if state_dict.key else ""
    name = unknown[0]
    if name in state_dict.tensors:
        raise UnreadableFileError(f"{name}{where} is no running statistic of a BatchNorm layer")
    near = difflib.get_close_matches(name, buffers, n=1, cutoff=0.5)
    raise UnreadableFileError(
        f"no {list_names(unknown, 3)}{where}" + (f"; did you mean {near[0]}?" if near else "")
    )


def _converted(name: str, new: Tensor, stored: StoredTensor) -> Tensor:
    """New values in the type of those in the file, on the CPU.

    Raises:
        UnreadableFileError: when they do not fit in number or in size.
    """
    if new.numel() == stored.num_elements == 1:
        new = new.reshape(stored.shape)  # early versions of PyTorch have counters of shape (1,)
    if tuple(new.shape) != stored.shape:
        raise UnreadableFileError(
            f"{name} has shape {stored.shape} in the file, and {tuple(new.shape)} in the new values"
        )
    new = new.detach().cpu()
    kind = str(stored.dtype).removeprefix("torch.")
    if new.is_complex():
        raise UnreadableFileError(f"{name} is {kind} in the file, and complex in the new values")
    converted = new.to(stored.dtype)
    if stored.dtype.is_floating_point:
        lost = new.isfinite() & ~converted.isfinite()
    else:
        lost = converted.to(new.dtype) != new
    if bool(lost.any()):
        raise UnreadableFileError(f"{name} is {kind} in the file, which cannot hold {new[lost][0].item():g}")
    return converted


def _patches(name: str, stored: StoredTensor, values: Tensor) -> list[Patch]:
    """Where the values lie in the file: one run of bytes, or one for each of a view with gaps.

    Raises:
        UnreadableFileError: where they have no bytes of their own.
    """
    if stored.storage.position is None:
        raise UnreadableFileError(
            f"{name} is compressed, which torch.save does not do; load the file and save it again"
        )
    size, data = stored.dtype.itemsize, as_bytes(values).numpy().tobytes()
    start = stored.storage.position() + stored.offset * size
    if stored.is_contiguous:
        return [Patch(start, data)] if data else []
    # channels_last, say: without gaps, in another order of the dimensions
    order = sorted(range(len(stored.shape)), key=lambda dimension: -stored.stride[dimension])
    dense = contiguous_stride(tuple(stored.shape[dimension] for dimension in order))
    if dense == tuple(stored.stride[dimension] for dimension in order):
        return [Patch(start, as_bytes(values.permute(order)).numpy().tobytes())]
    places = torch.zeros(stored.shape, dtype=torch.int64)
    for dimension, (length, stride) in enumerate(zip(stored.shape, stored.stride, strict=True)):
        along = [-1 if other == dimension else 1 for other in range(len(stored.shape))]
        places += (torch.arange(length) * stride).reshape(along)
    if places.unique().numel() < places.numel():
        raise UnreadableFileError(
            f"the numbers of {name} share their memory with each other; save a copy (tensor.clone())"
        )
    starts = (start + place * size for place in places.flatten().tolist())
    return [Patch(place, data[index * size : (index + 1) * size]) for index, place in enumerate(starts)]


def _check_bytes(
    owners: Mapping[Patch, str],
    changed: Mapping[str, StoredTensor],
    uses: UsesOfStorages,
    state_dict: StateDict,
) -> None:
    """Refuse to change bytes that belong to another tensor or object, too."""
    patches = sorted(owners)
    ends = [patch.end for patch in patches]

    def check(storage: Storage, start: int, size: int, user: Callable[[], str]) -> None:
        if storage.position is None or not patches:
            return
        start += storage.position()
        index = bisect_right(ends, start)
        if index < len(patches) and patches[index].position < start + size:
            raise _shared(owners[patches[index]], user(), "would change, too")

    for storage in uses.opaque:
        check(storage, 0, storage.size, lambda: "an object that bncli does not know")
    own = {id(tensor) for tensor in changed.values()}
    # safetensors has all of them in its state dict
    for tensor in uses.tensors or list(state_dict.tensors.values()):
        if id(tensor) not in own and tensor.num_elements:
            size = tensor.dtype.itemsize
            name_of = partial(_name_of, tensor, state_dict)
            check(tensor.storage, tensor.offset * size, tensor.span * size, name_of)


def _name_of(tensor: StoredTensor, state_dict: StateDict) -> str:
    names = (name for name, value in state_dict.tensors.items() if value is tensor)
    return next(names, f"a tensor of shape {tensor.shape} elsewhere in it")


def _check_places(content: object, changed: Mapping[str, StoredTensor]) -> None:
    """Refuse to change tensors that the content has in more places than they are named for.

    A tensor that is saved in two dicts, or a dict in two others, is in the file once.
    """
    names = {id(tensor): name for name, tensor in changed.items()}
    num_named = Counter(map(id, changed.values()))
    num_found, repeated = _count([content], names)
    num_found_again, _ = _count(repeated, names)
    for identity, name in names.items():
        if num_found[identity] > num_named[identity] or num_found_again[identity]:
            raise _shared(name, "another place that holds the same object", "would change, too")


def _count(roots: Sequence[object], wanted: Container[int]) -> tuple[Counter[int], list[object]]:
    """How often what lies below the roots holds the wanted objects, and which dicts and lists it holds twice.

    A module in two places is one module: it is not counted among these.
    """
    counted: Counter[int] = Counter()
    repeated: list[object] = []
    waiting, seen = list(roots), set(map(id, roots))
    while waiting:
        for part in parts_of(waiting.pop()):
            if id(part) in wanted:
                counted[id(part)] += 1
            elif isinstance(part, dict | list | tuple | Inert):
                if id(part) not in seen:
                    seen.add(id(part))
                    waiting.append(part)
                elif not isinstance(part, Inert):
                    repeated.append(part)
    return counted, repeated


def _shared(name: str, other: str, what: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"{name} shares its memory in the file with {other}, which {what};"
        " save a copy of one of them (tensor.clone())"
    )
