"""Arrays by name, of frameworks whose names tell what an array is: `LAYER._mean`, `LAYER/avg_mean`.

Which framework it was shows in what the running statistics are called. What a framework stores beside a
layer's name and four arrays, such as eps, is not there.
"""

from collections.abc import Collection, Mapping
from itertools import pairwise

from bncli.batchnorm.conventions import CAFFE2, CHAINER, KERAS_3, MINDSPORE, PADDLE, Convention
from bncli.checkpoints.formats.collected_network import LEAVES, Collected, are_statistics, natural
from bncli.checkpoints.stored_tensor import StoredTensor

# each with the sign between the layer and the array: MindSpore's and Keras' arrays have the same names, and
# only Keras, and what `bncli convert --to keras` writes, has a slash before them. What PyTorch's are called
# has no row here, as it needs no translation
_CONVENTIONS = (
    (PADDLE, "."),
    (PADDLE, "/"),
    (MINDSPORE, "."),
    (KERAS_3, "/"),
    (CHAINER, "."),
    (CHAINER, "/"),
)
# Caffe2 has a sign of its own, and two sets of names: `res2_0_branch2a_bn_s`, `..._bn_rm`
_OF_CAFFE2 = (None, ("gamma", "beta", "running_mean", "running_var"))


def recognise(tensors: Mapping[str, StoredTensor]) -> Collected | None:
    """The network, where BatchNorm's arrays are called as one of the frameworks does; else None."""
    for convention, sign in _CONVENTIONS:
        found = collect(tensors, convention, sign)
        if found.layers and convention is CHAINER:
            # its layers are written in the order of a set, which differs from run to run
            found.layers = dict(sorted(found.layers.items(), key=lambda one: natural(one[0])))
            found.notes.append("Chainer keeps no order of layers; they are sorted by name here")
        if found.layers and convention is KERAS_3:
            found.tensors = with_dots(found.tensors)  # kernels too, as they are called in Keras' own files
        if found.layers:
            return found
    for leaves in _OF_CAFFE2:
        found = collect(tensors, CAFFE2, "_", leaves)
        if found.layers:
            return found
    return None


def is_merged_by_caffe2(names: Collection[str]) -> bool:
    """Whether BatchNorm is only a scale and a bias of each channel, as Detectron's networks are trained."""
    return any(name.endswith("_bn_s") and f"{name[:-1]}b" in names for name in names)


def collect(
    tensors: Mapping[str, StoredTensor],
    convention: Convention,
    sign: str,
    leaves: tuple[str, str, str, str] | None = None,
) -> Collected:
    """BatchNorm layers by the names of a framework, in the order of the file; all else as it is called."""
    roles = leaves or (convention.weight, convention.bias, convention.running_mean, convention.running_var)
    found, used = Collected(), set[str]()
    for name in tensors:
        if name != roles[2] and not name.endswith(f"{sign}{roles[2]}"):
            continue
        prefix = name[: len(name) - len(roles[2])]
        keys = {leaf: f"{prefix}{role}" for leaf, role in zip(LEAVES, roles, strict=True)}
        parts = {leaf: tensors[key] for leaf, key in keys.items() if key in tensors}
        if not are_statistics(parts.get("running_mean"), parts.get("running_var")):
            continue
        count = parts["running_mean"].num_elements
        parts = {leaf: tensor for leaf, tensor in parts.items() if tensor.num_elements == count}
        layer = prefix.removesuffix(sign).replace("/", ".").strip(".") or "top"
        if layer in found.layers:
            continue
        found.add(layer, parts, convention)
        used.update(keys.values())
    if found.layers:
        found.add_others({name: tensor for name, tensor in tensors.items() if name not in used})
    return found


def with_dots(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`LAYER/running_mean` as `LAYER.running_mean`, as PyTorch would call it."""
    names = {name: name.replace("/", ".").strip(".") for name in tensors}
    one_each = len(set(names.values())) == len(names)
    return {names[name] if one_each else name: tensor for name, tensor in tensors.items()}


def in_order(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """As they are, or sorted by name where they have no order, as in what MLX writes.

    It shows in arrays of one layer that lie apart, or not as every network has them.
    """
    parts = [name.rpartition(".") for name in tensors]
    layers = [layer for layer, _, _ in parts]
    runs = [layer for layer, before in zip(layers, [None, *layers], strict=False) if layer != before]
    places = [(layer, LEAVES.index(leaf)) for layer, _, leaf in parts if leaf in LEAVES]
    are_usual = all(one[0] != two[0] or one[1] < two[1] for one, two in pairwise(places))
    if are_usual and len(runs) == len(set(runs)):
        return dict(tensors)
    return dict(sorted(tensors.items(), key=lambda one: natural(one[0])))
