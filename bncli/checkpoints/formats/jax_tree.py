"""BatchNorm in the trees of arrays that JAX's libraries save: Flax (linen and nnx) and Haiku.

Flax: `batch_stats/LAYER/mean|var` beside `params/LAYER/scale|bias` (linen), or all four under LAYER (nnx). A
layer without scale and bias is not in `params` at all, and not all in `batch_stats` is BatchNorm.
Haiku: `LAYER/~/mean_ema` and `LAYER/~/var_ema` with `hidden`, `average`, `counter` in the state, LAYER with
`scale` and `offset` in the parameters. `average` is what it evaluates with; `hidden` is too small by
1 - decay^counter.

One array may hold many layers (scan, vmap), or one layer once for each device (replicate).
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from bncli.batchnorm.bits import as_bytes
from bncli.batchnorm.conventions import FLAX, HAIKU, Convention
from bncli.batchnorm.layers import Hyperparameters
from bncli.batchnorm.state_dict import FLOATS
from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.stored_tensor import StoredTensor, stored_tensor

Path = tuple[str, ...]
MAX_STACK = 10_000  # layers in one array
MAX_LAYERS = 100_000
MAX_COMPARED = 64 * 2**20  # bytes of copies for several devices
DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float16", "bfloat16", "float32", "float64", "bool", "int8", "int16", "int32", "int64",
        "uint8", "uint16", "uint32", "uint64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
    )
}  # fmt: skip
_EVERY_ARRAY = "every array"
STATISTICS, _PARAMETERS = "batch_stats", "params"  # collections of Flax
_AFFINE = {"scale": "weight", "bias": "bias", "offset": "bias"}
_VALUE = ("value", "raw_value")  # what nnx.state puts below an attribute
_HAIKU = re.compile(r"(?P<layer>.*)/~/mean_ema")


@dataclass(frozen=True)
class _Layer:
    """What belongs to one BatchNorm layer, or to a stack of them."""

    prefix: Path  # of the network
    path: Path  # in the network
    statistics: Path  # where its mean lies
    arrays: Mapping[str, StoredTensor]  # running_mean, running_var, and weight, bias where it has them
    counter: StoredTensor | None
    convention: Convention
    used: frozenset[Path]  # the leaves that it is made of
    owner: Path | None  # where its parameters lie, or would in nnx; None where there is no telling

    @property
    def shape(self) -> tuple[int, ...]:
        return self.arrays["running_mean"].shape

    @property
    def around(self) -> Path:
        """Where the parameters of the module lie that the layer is in."""
        return self.owner[:-1] if self.owner else (*self.prefix, _PARAMETERS, *self.path[:-1])


@dataclass
class _Found:
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    layers: dict[str, Hyperparameters] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_tree(tree: Mapping[Path, StoredTensor]) -> ForeignNetwork:
    """What arrays are, by the path to each.

    Raises:
        UnreadableFileError: on damage.
    """
    leaves = _without_values(tree)
    nodes: dict[Path, dict[str, StoredTensor]] = {}
    for path, tensor in leaves.items():
        nodes.setdefault(path[:-1], {})[path[-1]] = tensor
    layers = [*_flax_layers(nodes), *_haiku_layers(nodes)]
    found = _Found()
    used = frozenset(path for layer in layers for path in layer.used)
    others = {path: tensor for path, tensor in leaves.items() if path not in used}
    layers = _in_order(layers, leaves, found.notes)
    layers = _one_of_each_device(layers, others, found.notes)
    shapes = _shapes_below(others)
    is_one = len({layer.prefix for layer in layers}) == 1
    stacks: list[str] = []
    for layer in layers:
        path = layer.path if is_one else (*layer.prefix, *layer.path)
        name = _free(".".join(path) or "BatchNorm", found.layers)
        _add(found, name, layer, shapes, stacks)
        if len(found.layers) > MAX_LAYERS:
            raise UnreadableFileError(f"more than {MAX_LAYERS:,} BatchNorm layers")
    if stacks and not any(note.startswith(_EVERY_ARRAY) for note in found.notes):
        found.notes.append(
            f"{_listed(stacks)}: one array for several layers, as scan and vmap make; they are listed as"
            " NAME[0], NAME[1], ..."
        )
    for path, tensor in others.items():
        found.tensors[_free(".".join(path), found.tensors)] = tensor
    return ForeignNetwork(found.tensors, found.layers, tuple(found.notes))


def _without_values(tree: Mapping[Path, StoredTensor]) -> dict[Path, StoredTensor]:
    leaves = {}
    for path, tensor in tree.items():
        short = path[:-1]
        is_value = len(path) > 1 and path[-1] in _VALUE and short not in tree
        leaves[short if is_value and short not in leaves else path] = tensor
    return leaves


# ---- which arrays are whose


def _flax_layers(nodes: Mapping[Path, Mapping[str, StoredTensor]]) -> Iterator[_Layer]:
    for place, arrays in nodes.items():
        mean, var = arrays.get("mean"), arrays.get("var")
        if mean is None or var is None or not _are_statistics(mean, var) or "opt_state" in place:
            continue
        if STATISTICS in place:
            if len(arrays) != 2:
                continue
            index = place.index(STATISTICS)
            prefix, path = place[:index], place[index + 1 :]
            owners = _owners(prefix, path)
        elif set(arrays) <= {"mean", "var", "scale", "bias"}:
            prefix, path = (), place
            owners = [place, (_PARAMETERS, *place[1:])]
        else:
            continue  # something else that measures, such as an observation normalizer with a count
        used = {(*place, "mean"), (*place, "var")}
        known = {"running_mean": mean, "running_var": var}
        owner = _add_affine(known, used, nodes, owners)
        if owner is None and STATISTICS not in place:
            owner = place
        yield _Layer(prefix, path, (*place, "mean"), known, None, FLAX, frozenset(used), owner)


def _owners(prefix: Path, path: Path) -> list[Path]:
    """Where the parameters of `prefix/batch_stats/path` may lie: beside it, or beside what it is in."""
    places = [prefix[:length] for length in range(len(prefix), -1, -1)]
    return [
        (*place, *names, *path)
        for place in places
        for names in ((_PARAMETERS,), (_PARAMETERS, _PARAMETERS))
    ]  # fmt: skip


def _haiku_layers(nodes: Mapping[Path, Mapping[str, StoredTensor]]) -> Iterator[_Layer]:
    parameters: dict[str, list[Path]] = {}
    for place, arrays in nodes.items():
        if place and not set(arrays).isdisjoint(("scale", "offset")):
            parameters.setdefault(place[-1], []).append(place)
    for place, arrays in nodes.items():
        match = _HAIKU.fullmatch(place[-1]) if place else None
        variances = nodes.get((*place[:-1], f"{match['layer']}/~/var_ema"), {}) if match else {}
        mean, var = arrays.get("average"), variances.get("average")
        if match is None or mean is None or var is None or not _are_statistics(mean, var):
            continue
        layer = match["layer"]
        used = {(*place[:-1], f"{layer}/~/{ema}", leaf) for ema in ("mean_ema", "var_ema") for leaf in _EMA}
        known = {"running_mean": mean, "running_var": var}
        owner = _add_affine(known, used, nodes, parameters.get(layer, []))
        counter = arrays.get("counter")
        yield _Layer(place[:-1], (layer,), (*place, "average"), known, counter, HAIKU, frozenset(used), owner)


_EMA = ("hidden", "average", "counter")


def _add_affine(
    known: dict[str, StoredTensor],
    used: set[Path],
    nodes: Mapping[Path, Mapping[str, StoredTensor]],
    owners: list[Path],
) -> Path | None:
    """Add weight and bias from the first of the places that has what fits; that place."""
    shape = known["running_mean"].shape
    for owner in owners:
        fitting = {
            leaf: tensor
            for leaf, tensor in nodes.get(owner, {}).items()
            if leaf in _AFFINE and tensor.shape == shape and tensor.dtype in FLOATS
        }
        if fitting:
            known |= {_AFFINE[leaf]: tensor for leaf, tensor in fitting.items()}
            used |= {(*owner, leaf) for leaf in fitting}
            return owner
    return None


def _are_statistics(mean: StoredTensor, var: StoredTensor) -> bool:
    return (
        mean.shape == var.shape
        and len(mean.shape) > 0
        and mean.num_elements > 0
        and {mean.dtype, var.dtype} <= set(FLOATS)
    )


# ---- their order


def _in_order(layers: list[_Layer], leaves: Mapping[Path, StoredTensor], notes: list[str]) -> list[_Layer]:
    """By the file, where it has the order of calls; where it is sorted as text, by the numbers in names."""
    if len(layers) < 2 or not _is_sorted(layer.statistics for layer in layers):
        return layers
    positions = {path[:-1]: index for index, path in reversed(list(enumerate(leaves)))}
    owners = [layer.owner for layer in layers if layer.owner in positions]
    if len(owners) == len(layers) and not _is_sorted(owner for owner in owners if owner is not None):
        return sorted(layers, key=lambda layer: positions[layer.owner or ()])
    notes.append(
        "the file sorts names as text; the layers are in the order of their names and numbers, which may"
        " not be the network's"
    )
    return sorted(layers, key=lambda layer: (layer.prefix, [_natural(part) for part in layer.path]))


def _is_sorted(paths: Iterable[Path]) -> bool:
    listed = list(paths)
    return listed == sorted(listed)


def _natural(text: str) -> list[tuple[str, int]]:
    """A sort key that puts `layer_10` behind `layer_2`."""
    parts = re.split(r"(\d{1,9})", text)
    return [
        (parts[index], int(parts[index + 1]) if index + 1 < len(parts) else -1)
        for index in range(0, len(parts), 2)
    ]


# ---- arrays of several layers, or devices


def _one_of_each_device(
    layers: list[_Layer], others: Mapping[Path, StoredTensor], notes: list[str]
) -> list[_Layer]:
    """Without the leading axis that jax_utils.replicate gives to every array, where the copies are equal."""
    shapes = [tensor.shape for path, tensor in others.items() if _is_parameter(path)]
    counts = {shape[0] if shape else 0 for shape in (*shapes, *(layer.shape for layer in layers))}
    if not shapes or len(counts) != 1 or any(len(layer.shape) < 2 for layer in layers):
        return layers
    (count,) = counts
    if count > 1:
        size = sum(t.num_elements * t.dtype.itemsize for layer in layers for t in layer.arrays.values())
        differ = {
            leaf
            for layer in layers
            for leaf, tensor in layer.arrays.items()
            if size > MAX_COMPARED or not _are_rows_equal(tensor)
        }
        if differ:
            what = (
                f"{count} devices: their weights are equal, but each has running statistics of its own, which"
                " were not averaged before saving"
                if differ.isdisjoint(_AFFINE.values()) and _are_trained(layers)
                else f"{count} devices or networks, and the layers differ"
            )
            notes.append(
                f"{_EVERY_ARRAY} is there {count} times, as for {what}; they are listed as NAME[0],"
                " NAME[1], ..."
            )
            return layers
        notes.append(f"{_EVERY_ARRAY} is there {count} times, as for {count} devices; the copies are equal")
    return [
        replace(
            layer,
            arrays={leaf: _row(tensor, 0) for leaf, tensor in layer.arrays.items()},
            counter=_row(layer.counter, 0) if layer.counter and layer.counter.shape else layer.counter,
        )
        for layer in layers
    ]


def _are_trained(layers: Iterable[_Layer]) -> bool:
    """Whether weights or biases differ from the start, where those of several networks are equal, too."""
    affine = (tensor for layer in layers for leaf, tensor in layer.arrays.items() if leaf in _AFFINE.values())
    return any(len(_row(tensor, 0).read().unique()) > 1 for tensor in affine)


def _is_parameter(path: Path) -> bool:
    return "opt_state" not in path and (_PARAMETERS in path or STATISTICS not in path) and len(path) > 1


def _are_rows_equal(tensor: StoredTensor) -> bool:
    numbers = as_bytes(tensor.read()).reshape(tensor.shape[0], -1)
    return bool((numbers == numbers[:1]).all())


def _add(
    found: _Found, name: str, layer: _Layer, shapes: Mapping[Path, set[tuple[int, ...]]], stacks: list[str]
) -> None:
    """Note a layer, or each of a stack of layers."""
    views = [("", layer)]
    num_axes = _stacked_axes(layer, shapes)
    if math.prod(layer.shape[:num_axes]) > MAX_STACK:
        raise UnreadableFileError(f"a stack of more than {MAX_STACK:,} layers in one array")
    for _ in range(num_axes):
        views = [
            (f"{suffix}[{index}]", _one_of(part, index))
            for suffix, part in views
            for index in range(part.shape[0])
        ]
    if views[0][0]:
        stacks.append(name)
    if len(_long(views[0][1].shape)) > 1:
        found.notes.append(f"{name}: BatchNorm over several axes, of shape {views[0][1].shape}")
    for suffix, part in views:
        own = _free(f"{name}{suffix}", found.layers)
        for leaf, tensor in part.arrays.items():
            found.tensors[f"{own}.{leaf}"] = _flat(tensor)
        if part.counter is not None and part.counter.num_elements == 1:
            found.tensors[f"{own}.num_batches_tracked"] = part.counter
        found.layers[own] = Hyperparameters(
            num_features=part.arrays["running_mean"].num_elements,
            eps=None,
            momentum=None,
            momentum_known=False,
            convention=layer.convention,
        )


def _stacked_axes(layer: _Layer, shapes: Mapping[Path, set[tuple[int, ...]]]) -> int:
    """How many leading axes count layers.

    Two axes may also be those that BatchNorm keeps (`axis=(1, 3)`); then what lies beside the layer has no
    such leading axis. Haiku keeps all axes, with a length of 1 where it averages.
    """
    if layer.convention is HAIKU:
        long = _long(layer.shape)
        return long[-2] + 1 if len(long) > 1 else 0
    beside = shapes.get(layer.around, set()) if layer.path else set()
    count = 0
    while count < len(layer.shape) - 1:
        length = layer.shape[count]
        if any(len(shape) <= count or shape[count] != length for shape in beside):
            break
        count += 1
    return count


def _shapes_below(others: Mapping[Path, StoredTensor]) -> dict[Path, set[tuple[int, ...]]]:
    """The shapes of what is not BatchNorm, by each module that it is in."""
    found: dict[Path, set[tuple[int, ...]]] = {}
    for path, tensor in others.items():
        if _is_parameter(path):
            for length in range(len(path)):
                found.setdefault(path[:length], set()).add(tensor.shape)
    return found


def _long(shape: tuple[int, ...]) -> list[int]:
    """The axes that are longer than 1."""
    return [axis for axis, length in enumerate(shape) if length != 1]


def _one_of(layer: _Layer, index: int) -> _Layer:
    arrays = {leaf: _row(tensor, index) for leaf, tensor in layer.arrays.items()}
    counter = layer.counter
    if counter is not None and counter.shape and index < counter.shape[0]:
        counter = _row(counter, index)
    return replace(layer, arrays=arrays, counter=counter)


def _row(tensor: StoredTensor, index: int) -> StoredTensor:
    offset = tensor.offset + index * tensor.stride[0]
    return stored_tensor(tensor.storage, tensor.dtype, offset, tensor.shape[1:], tensor.stride[1:])


def _flat(tensor: StoredTensor) -> StoredTensor:
    """The same numbers as (C,)."""
    long = _long(tensor.shape)
    if len(long) > 1 and not tensor.is_contiguous:
        raise UnreadableFileError("BatchNorm over several axes that lie column by column in the file")
    step = tensor.stride[long[0]] if len(long) == 1 else 1
    return stored_tensor(tensor.storage, tensor.dtype, tensor.offset, (tensor.num_elements,), (step,))


def _free(name: str, taken: Mapping[str, object]) -> str:
    """A name that no other has: names with dots may become equal when they are joined."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    return free


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
