"""Files of Equinox: `eqx.tree_serialise_leaves`, arrays of NumPy one after another, without names.

Their order is that of the fields of the classes. A BatchNorm has weight and bias (or none) and `inference` in
the model. Its statistics lie in the state, which follows the model: a counter, mean, variance (mode "batch"),
or whether it is the first time, mean and variance (mode "ema"). In mode "batch" Equinox evaluates with both
divided by 1 - momentum^counter, though only the mean starts at 0; the momentum is not in the file.
A line of JSON may stand before the arrays, as Equinox's documentation has it.
"""

from collections.abc import Iterable

import numpy as np
import torch

from bncli.batchnorm.conventions import EQUINOX
from bncli.batchnorm.layers import Hyperparameters
from bncli.batchnorm.state_dict import FLOATS
from bncli.checkpoints.byte_source import ByteSource, UnreadableFileError
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.npy import OBJECTS, OTHERS, SIGNATURE, Header, array_tensor, read_header
from bncli.checkpoints.stored_tensor import Storage, StoredTensor, contiguous_stride, stored_tensor

MAX_LINE = 2**16  # bytes of the JSON
MAX_ARRAYS = 200_000
_COUNTERS = (torch.int32, torch.int64)
_Leaf = StoredTensor | None  # None: of a type that bncli does not read


def read_if_equinox(file: ByteSource, start: bytes) -> tuple[str, ForeignNetwork] | None:
    """A stream of several arrays; None for another file, and for a single array.

    Raises:
        UnreadableFileError: on damage.
    """
    position = _start(file, start)
    if position is None or _header(file, position).kind in (OBJECTS, OTHERS):
        return None
    leaves: list[_Leaf] = []
    while position < file.size:
        if len(leaves) == MAX_ARRAYS:
            raise UnreadableFileError(f"a stream of more than {MAX_ARRAYS:,} arrays")
        leaf, position = _read_leaf(file, position)
        if position == file.size and not leaves:
            return None
        leaves.append(leaf)
    return "equinox", _read_network(leaves)


def _start(file: ByteSource, start: bytes) -> int | None:
    """Where the first array begins."""
    if start.startswith(SIGNATURE):
        return 0
    if not start.startswith(b"{"):
        return None
    line, end, rest = file.read_at(0, min(file.size, MAX_LINE)).partition(b"\n")
    return len(line) + 1 if end and rest.startswith(SIGNATURE) else None


def _read_leaf(file: ByteSource, position: int) -> tuple[_Leaf, int]:
    """An array, and where the next one begins."""
    header = _header(file, position)
    begin = position + header.length
    storage = Storage(
        header.size, lambda start, size: file.read_at(begin + start, size), position=lambda: begin
    )
    return array_tensor(header, storage), begin + header.size


def _header(file: ByteSource, position: int) -> Header:
    return read_header(lambda start, size: file.read_at(position + start, size), file.size - position)


def _read_network(leaves: list[_Leaf]) -> ForeignNetwork:
    state = _state(leaves)
    model = leaves[: len(leaves) - 3 * len(state)]
    found = _affine(model)
    affine = [_arrays(model, index) for index in found]
    fits = len(affine) == len(state) and _fits(affine, state)
    notes = ["Equinox writes no names: the layers are numbered in the order of the fields of its classes"]
    if state and not fits:
        notes.append("which weight and bias belong to which statistics cannot be told")
    tensors: dict[str, StoredTensor] = {}
    layers: dict[str, Hyperparameters] = {}
    used: set[int] = set()
    uncertain, never = [], []
    for index, (first, mean, var) in enumerate(state):
        name = f"batch_norm_{index}"
        statistics = {"running_mean": mean, "running_var": var}
        if first.dtype in _COUNTERS:
            count = int(first.read().item())
            scale = _scale(count)
            statistics = {leaf: _divided(tensor, scale) for leaf, tensor in statistics.items()}
            statistics["num_batches_tracked"] = first
            if scale != 1:
                uncertain.append(name)
        elif first.read().item():
            never.append(name)
        if fits and affine[index] is not None:
            statistics |= dict(zip(("weight", "bias"), affine[index] or (), strict=True))
            used |= {found[index] - 2, found[index] - 1}
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in statistics.items()}
        layers[name] = Hyperparameters(
            num_features=mean.num_elements,
            eps=None,
            momentum=None,
            momentum_known=False,
            convention=EQUINOX,
        )
    if uncertain:
        notes.append(
            "mean and variance are divided by 1 - momentum^counter, as Equinox does to evaluate; the momentum"
            f" is not in the file, and taken to be its default, {EQUINOX.default_momentum}"
        )
    if never:
        notes.append(f"{', '.join(never[:3])}: never trained, the statistics are not even initialised")
    tensors |= {
        str(index): leaf for index, leaf in enumerate(model) if leaf is not None and index not in used
    }
    return ForeignNetwork(tensors, layers, tuple(notes) if layers else ())


def _state(leaves: list[_Leaf]) -> list[tuple[StoredTensor, StoredTensor, StoredTensor]]:
    """The statistics at the end of the stream: a scalar and two arrays (C,) for each layer."""
    found = []
    for start in range(len(leaves) - 3, -1, -3):
        first, mean, var = leaves[start : start + 3]
        if first is None or mean is None or var is None or not _is_pair(mean, var) or first.shape:
            break
        if first.dtype not in (*_COUNTERS, torch.bool):
            break
        if first.dtype == torch.bool and start and _is_probability(leaves[start - 1]):
            break  # of Dropout, with a LayerNorm behind it
        found.append((first, mean, var))
    return found[::-1]


def _affine(model: Iterable[_Leaf]) -> list[int]:
    """Where in the model the flag `inference` of each BatchNorm lies; Dropout's follows a probability."""
    leaves = list(model)
    return [
        index
        for index, leaf in enumerate(leaves)
        if leaf is not None
        and leaf.dtype == torch.bool
        and leaf.shape == ()
        and not (index and _is_probability(leaves[index - 1]))
    ]


def _arrays(model: list[_Leaf], index: int) -> tuple[StoredTensor, StoredTensor] | None:
    """Weight and bias before a flag; None where the layer has none."""
    weight, bias = (model[index - 2], model[index - 1]) if index >= 2 else (None, None)
    return (weight, bias) if weight and bias and _is_pair(weight, bias) else None


def _fits(
    affine: list[tuple[StoredTensor, StoredTensor] | None],
    state: list[tuple[StoredTensor, StoredTensor, StoredTensor]],
) -> bool:
    return all(
        pair is None or pair[0].shape == mean.shape for pair, (_, mean, _) in zip(affine, state, strict=False)
    )


def _is_pair(first: StoredTensor, second: StoredTensor) -> bool:
    return (
        len(first.shape) == 1
        and first.shape == second.shape
        and first.num_elements > 0
        and {first.dtype, second.dtype} <= set(FLOATS)
    )


def _is_probability(leaf: _Leaf) -> bool:
    return leaf is not None and leaf.shape == () and leaf.dtype in FLOATS


def _scale(count: int) -> float:
    """What Equinox divides by, in float32 as it does: in float64 it would be another after few steps."""
    momentum = np.float32(EQUINOX.default_momentum)
    return 1.0 if count <= 0 else float(np.float32(1) - momentum ** np.float32(count))


def _divided(tensor: StoredTensor, scale: float) -> StoredTensor:
    """The numbers divided by `scale` when they are read, in their own type."""

    def read(start: int, size: int) -> bytes:
        data = (tensor.read() / scale).contiguous().view(torch.uint8).numpy().tobytes()
        return data[start : start + size]

    size = tensor.num_elements * tensor.dtype.itemsize
    shape = tensor.shape
    return stored_tensor(Storage(size, read), tensor.dtype, 0, shape, contiguous_stride(shape))
