"""Any checkpoint of anyone's, opened to look at its BatchNorm layers.

Formats are recognised by their first bytes, whatever the file is called. Nothing in the file is executed
and nothing is written to it; only the tensors of BatchNorm are read.
"""

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bncli.batchnorm import Hyperparameters, LayerStats, read_running_stats
from bncli.batchnorm.layers import AVERAGED_KEY
from bncli.checkpoints.byte_source import (
    ByteSource,
    DirectoryError,
    ForeignFileError,
    UnreadableFileError,
    open_source,
)
from bncli.checkpoints.formats import torch_legacy, torch_zip
from bncli.checkpoints.formats.foreign import describe_directory, recognise_name, recognise_shard
from bncli.checkpoints.formats.safetensors_file import is_safetensors, read_safetensors
from bncli.checkpoints.formats.shard_index import MAX_INDEX, place_beside, read_index
from bncli.checkpoints.locate import (
    FLOATS,
    Candidate,
    NothingToReadError,
    StateDict,
    choose,
    describe_without_names,
    find_state_dicts,
    is_per_channel,
    strip_prefixes,
)
from bncli.checkpoints.own_config import own_hyperparameters
from bncli.checkpoints.stored_tensor import StoredTensor

# Of all BatchNorm layers together: 8 million channels, where a network has thousands. Read, copied and
# judged they take several times that.
MAX_BYTES_OF_LAYERS = 128 * 2**20
_LEAVES = ("running_mean", "running_var", "weight", "bias", "num_batches_tracked")

COUNTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose tensors can be read as long as it is open."""

    source: str  # path or URL as given
    kind: str  # 'torch zip', 'torch legacy', 'torchscript', 'safetensors', 'safetensors index', 'torch index'
    key: str  # where the chosen state dict lies, dotted; '' for the top
    candidates: tuple[Candidate, ...]  # with BatchNorm layers, outermost first
    tensors: Mapping[str, StoredTensor]  # of the chosen state dict, in file order, common prefixes stripped
    hyperparameters: Mapping[str, Hyperparameters]  # by layer name, as far as the file tells
    layer_names: tuple[str, ...] = field(repr=False)

    def layers(self) -> tuple[LayerStats, ...]:
        """All BatchNorm layers; only their tensors are read.

        Raises:
            CheckpointError: when those are damaged, or far larger than any network's.
        """
        wanted = {name: self.tensors[name] for layer in self.layer_names for name in self._names_of(layer)}
        known = {
            name: self.hyperparameters[name] for name in self.layer_names if name in self.hyperparameters
        }
        features = sum(hyperparameters.num_features for hyperparameters in known.values())
        size = sum(tensor.num_elements * tensor.dtype.itemsize for tensor in wanted.values())
        with _named(self.source), _without_collector():
            if max(size, 4 * features) > MAX_BYTES_OF_LAYERS:
                raise UnreadableFileError("its BatchNorm layers are far larger than those of any network")
            state: dict[str, object] = {name: tensor.read() for name, tensor in wanted.items()}
            if AVERAGED_KEY in self.tensors:
                state[AVERAGED_KEY] = None  # that it is there is all that counts
            layers = {layer.name: layer for layer in read_running_stats(state, known)}
        return tuple(layers[name] for name in self.layer_names)

    def _names_of(self, layer: str) -> Iterator[str]:
        """The tensors of one layer that fit it, by their names."""
        path = f"{layer}." if layer else ""
        mean, var, *affine, counter = (self.tensors.get(f"{path}{leaf}") for leaf in _LEAVES)
        known = self.hyperparameters.get(layer)
        shape: tuple[int, ...] = (known.num_features,) if known else ()
        pair = (mean, var) if mean is not None and var is not None else ()
        if pair and all(map(is_per_channel, pair)) and pair[0].shape == pair[1].shape:
            yield from (f"{path}running_mean", f"{path}running_var")
            shape = pair[0].shape
        for leaf, tensor in zip(("weight", "bias"), affine, strict=True):
            if tensor is not None and is_per_channel(tensor) and tensor.shape == shape:
                yield f"{path}{leaf}"
        if counter is not None and counter.num_elements == 1 and counter.dtype in COUNTS + FLOATS:
            yield f"{path}num_batches_tracked"


@contextmanager
def open_checkpoint(source: str | Path, key: str | None = None) -> Iterator[OpenCheckpoint]:
    """Open a file of any kind, local or at a URL that fsspec opens, without executing anything in it.

    `key` says where the state dict lies, such as `ema` or `checkpoint.model`, where the rule of
    `bncli.checkpoints.locate` would choose another.

    Raises:
        CheckpointError: naming the file and what is wrong with it, or what it holds instead of BatchNorm.
    """
    source = str(source)
    with ExitStack() as stack:
        with _named(source), _without_collector():
            kind, content = _read(_open(source, stack), stack)
            found = find_state_dicts(content)
            if not found:
                raise _without_tensors(kind, content, source)
            chosen = strip_prefixes(choose(_with_own_hyperparameters(found, content), key))
            candidates = tuple(state_dict.candidate for state_dict in found if state_dict.layer_names)
            del content, found  # all but the chosen tensors
        yield OpenCheckpoint(
            source=source,
            kind=kind,
            key=chosen.key,
            candidates=candidates,
            tensors=chosen.tensors,
            hyperparameters=chosen.hyperparameters,
            layer_names=tuple(chosen.layer_names),
        )


def _open(source: str, stack: ExitStack) -> ByteSource:
    try:
        return stack.enter_context(open_source(source))
    except DirectoryError as error:
        raise ForeignFileError(describe_directory(source, error.names)) from None


def _without_tensors(kind: str, content: object, source: str) -> UnreadableFileError:
    """What a file of PyTorch holds that has no tensor with a name."""
    if kind == "torchscript":
        return ForeignFileError(
            "a TorchScript without parameters and buffers, as torch.jit.freeze leaves it: it folds BatchNorm"
            " into other layers, or makes its numbers constants without names; give the model before that"
        )
    shard = recognise_shard(content, source)
    return ForeignFileError(shard.sentence) if shard else NothingToReadError(describe_without_names(content))


def _read(file: ByteSource, stack: ExitStack) -> tuple[str, object]:
    """The kind of a file, and its content with `StoredTensor` for tensors."""
    start = file.read_at(0, min(file.size, 300))
    if not start:
        raise UnreadableFileError("an empty file, not a checkpoint")
    if start.startswith(torch_zip.SIGNATURE):
        return torch_zip.read_torch_zip(file)
    if is_safetensors(start):
        return "safetensors", _read_safetensors(file)
    if start.lstrip()[:1] == b"{":
        kinds = []

        def read_shard(name: str) -> Mapping[str, object]:
            kind, content = _read_shard(file.name, name, stack)
            kinds.append(kind)
            return content

        if file.size > MAX_INDEX:
            raise UnreadableFileError(f"not a checkpoint: text of {file.size:,} bytes")
        tensors = read_index(file.read_at(0, file.size), read_shard)
        return "safetensors index" if set(kinds) <= {"safetensors"} else "torch index", tensors
    return "torch legacy", torch_legacy.read_torch_legacy(file)


def _read_safetensors(file: ByteSource) -> Mapping[str, object]:
    try:
        return read_safetensors(file)
    except UnreadableFileError:
        known = recognise_name(file.name)  # the numbers of TensorFlow may begin as a header does
        if known is None:
            raise
        raise ForeignFileError(known.sentence) from None


def _read_shard(index: str, name: str, stack: ExitStack) -> tuple[str, Mapping[str, object]]:
    """One file of an index: a state dict at the top of a torch file, or safetensors."""
    path = place_beside(index, name)
    with _named(path):
        file = _open(path, stack)
        if file.read_at(0, 1) == b"{":
            raise UnreadableFileError("an index, where a file with tensors was expected")
        kind, content = _read(file, stack)
        if not isinstance(content, dict):
            raise UnreadableFileError("no state dict, as a file of an index has to be")
    return kind, content


def _with_own_hyperparameters(found: list[StateDict], content: object) -> list[StateDict]:
    """A checkpoint of bncli's tells momentum, eps and more of the layers in `state_dict`."""
    for state_dict in found:
        if state_dict.key == "state_dict":
            means = {
                name: state_dict.tensors[f"{name}.running_mean"] for name in state_dict.layer_names if name
            }
            known = own_hyperparameters(content, {name: mean.shape[0] for name, mean in means.items()})
            state_dict.hyperparameters |= known
            state_dict.layer_names += [name for name in known if name not in means]
    return found


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Put the file's name before what is wrong with it."""
    try:
        yield
    except UnreadableFileError as error:
        raise error.public(f"{source}: {error}") from None


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the collector of cycles: among the many new objects it would search for ever and find none."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
