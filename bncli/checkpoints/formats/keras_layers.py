"""Files of Keras: `.keras`, `.weights.h5` and the older `.h5`, of Keras 3 and of tf.keras 2.

Keras knows a layer in a file by its class and number, not by its name: `layers/batch_normalization_3/vars/0`.
Which array is what depends on the layer's configuration, which `.keras` has beside the arrays (config.json)
and `.h5` in an attribute; `.weights.h5` has none. The order of groups in HDF5 is that of the alphabet, so the
order of layers comes from the configuration, or from the numbers.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from bncli.batchnorm.conventions import KERAS_2, KERAS_2_OR_3, KERAS_3, Convention
from bncli.batchnorm.state_dict import FLOATS
from bncli.checkpoints.byte_source import ForeignFileError, UnreadableFileError
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.hdf5 import Hdf5File
from bncli.checkpoints.formats.keras_batch_norm import (
    RENORM,
    STATISTICS,
    Found,
    LayerConfig,
    is_batch_norm,
    natural_order,
)
from bncli.checkpoints.formats.keras_windows import keras_windows
from bncli.checkpoints.formats.safetensors_file import parse_json
from bncli.checkpoints.stored_tensor import StoredTensor

MAX_LAYERS = 200_000  # of a configuration
MAX_DEPTH = 40
_GROUP = re.compile(r"(?:sync_)?batch_normalization(?:_\d+)?")


# ---- .keras and .weights.h5


def read_keras(file: Hdf5File, config: object, metadata: object) -> ForeignNetwork:
    """The weights of a `.keras` file with its config.json and metadata.json.

    Raises:
        UnreadableFileError: on damage.
    """
    version = str(metadata.get("keras_version", "")) if isinstance(metadata, dict) else ""
    layers = dict(_by_group(config)) if isinstance(config, dict) else {}
    return replace(_read_vars([file], layers, _convention(version)), windows=dict(keras_windows(config)))


def read_weights(files: list[Hdf5File]) -> ForeignNetwork:
    """A `.weights.h5` file, or the shards of one; there is no configuration."""
    return _read_vars(files, {}, None)


def _convention(version: str) -> Convention:
    if version.startswith("3."):
        return KERAS_3
    return KERAS_2 if version.startswith("2.") else KERAS_2_OR_3


def _read_vars(
    files: list[Hdf5File], layers: Mapping[str, LayerConfig], convention: Convention | None
) -> ForeignNetwork:
    """Arrays that lie in groups called `vars`; those of one layer may be divided among the files."""
    groups: dict[str, dict[int, StoredTensor]] = {}
    names: dict[str, str] = {}
    for file in files:
        for path, node in file.paths():
            parent, _, leaf = path.rpartition("/")
            owner, _, last = parent.rpartition("/")
            if path == "vars" or path.endswith("/vars"):
                own_name = file.attributes(node).get("name")
                if isinstance(own_name, str):
                    names[parent] = own_name
            elif (parent == "vars" or last == "vars") and leaf.isdecimal() and len(leaf) < 10:
                tensor = file.tensor(node)
                if tensor is not None:
                    groups.setdefault(owner, {})[int(leaf)] = tensor
    if not groups:
        raise ForeignFileError("an HDF5 file, but not one that Keras wrote: it has no layers")
    found = Found(convention or (KERAS_3 if names else KERAS_2_OR_3))
    places = {path: place for place, path in enumerate(layers)}
    for path in sorted(groups, key=lambda path: (_place(path, places), natural_order(path))):
        if path == "optimizer" or path.startswith("optimizer/"):
            continue
        arrays = [groups[path][index] for index in sorted(groups[path])]
        layer = layers.get(path)
        name = layer.name if layer else _name_of(path, names)
        if max(groups[path]) >= len(arrays) and _GROUP.fullmatch(path.rpartition("/")[2]):
            raise UnreadableFileError(
                f"arrays of {name[:80]} are missing; where a network lies in several files, give the"
                " .weights.json"
            )
        roles = _roles(path, arrays, layer)
        if roles is None:
            found.tensors |= {f"{name}.{index}": tensor for index, tensor in sorted(groups[path].items())}
        else:
            found.add(name, roles, layer)
    return found.network()


def _place(path: str, places: Mapping[str, int]) -> int:
    """Where the configuration has a group, or the layer of somebody's class that it is in."""
    while path and path not in places:
        path = path.rpartition("/")[0]
    return places.get(path, len(places))


def _roles(
    path: str, arrays: list[StoredTensor], layer: LayerConfig | None
) -> dict[str, StoredTensor] | None:
    """The arrays of a BatchNorm layer by what they are; None for those of another layer."""
    count = arrays[0].num_elements
    alike = all(tensor.num_elements == count and tensor.dtype in FLOATS for tensor in arrays)
    if not count or not alike:
        return None
    if layer is not None:
        known = layer.is_batch_norm and len(layer.roles) == len(arrays)
        return dict(zip(layer.roles, arrays, strict=True)) if known else None
    in_group = _GROUP.fullmatch(path.rpartition("/")[2]) is not None
    by_number: dict[int, tuple[str, ...]] = {
        2: STATISTICS,
        3: ("weight_or_bias", *STATISTICS),
        4: ("gamma", "beta", *STATISTICS),
        5: (*STATISTICS, *RENORM),
        6: ("weight_or_bias", *STATISTICS, *RENORM),
        7: ("gamma", "beta", *STATISTICS, *RENORM),
    }
    roles = by_number.get(len(arrays))
    # outside of such groups (an attribute of somebody's class) only four arrays of one length are certain
    if roles is None or not (in_group or (len(arrays) == 4 and len(arrays[0].shape) == 1)):
        return None
    return dict(zip(roles, arrays, strict=True))


def _name_of(path: str, names: Mapping[str, str]) -> str:
    """A layer's name: what Keras says since 3.6 of those in lists, the attribute or the group of others."""
    parts = path.split("/")
    said = []
    for index, part in enumerate(parts):
        in_list = index > 0 and parts[index - 1] == "layers"
        if part != "layers" or index == len(parts) - 1:
            said.append(names.get("/".join(parts[: index + 1]), part) if in_list else part)
    return ".".join(said)


def _by_group(
    model: Mapping[str, Any], path: str = "", names: tuple[str, ...] = (), depth: int = 0
) -> Iterator[tuple[str, LayerConfig]]:
    """Every layer of a configuration with its group: classes are numbered in each network by itself."""
    inner = _inner(model)
    if depth > MAX_DEPTH:
        raise UnreadableFileError("a configuration of networks that are nested too deeply")
    numbers: Counter[str] = Counter()
    for entry in inner.get("layers", ()) if isinstance(inner.get("layers"), list) else ():
        if not isinstance(entry, dict):
            continue
        group = _snake(str(entry.get("class_name", "")))
        number = numbers[group]
        numbers[group] += 1
        place = f"{path}layers/{group}_{number}" if number else f"{path}layers/{group}"
        yield from _one(entry, place, names, depth)


def _one(
    entry: Mapping[str, Any], place: str, names: tuple[str, ...], depth: int
) -> Iterator[tuple[str, LayerConfig]]:
    config = _inner(entry)
    own = (*names, str(config.get("name") or entry.get("name") or place.rpartition("/")[2]))
    yield place, LayerConfig(str(entry.get("class_name", "")), ".".join(own), config)
    if isinstance(config.get("layers"), list):
        yield from _by_group(entry, f"{place}/", own, depth + 1)
    elif isinstance(config.get("layer"), dict) and depth < MAX_DEPTH:
        yield from _one(config["layer"], f"{place}/layer", own, depth + 1)


def _inner(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    config = entry.get("config")
    return config if isinstance(config, dict) else {}


def _snake(name: str) -> str:
    """As Keras makes the name of a group from that of a class: `re_lu`, `conv2d_transpose`."""
    return re.sub(r"(?<=.)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", re.sub(r"\W+", "", name)).lower()


# ---- .h5


def read_legacy(file: Hdf5File) -> ForeignNetwork | None:
    """The older `.h5`, of `model.save` and of `save_weights`; None where it is none.

    Raises:
        UnreadableFileError: on damage.
    """
    top = file.attributes()
    root = "" if "layer_names" in top or "layer_names0" in top else "model_weights"
    nodes = dict(file.paths())
    if root and root not in nodes:
        return None
    described = file.attributes(nodes[root]) if root else top
    version = str(top.get("keras_version") or described.get("keras_version") or "")
    found = Found(_convention(version))
    text = top.get("model_config")
    config = parse_json(text.encode()) if isinstance(text, str) and text else {}
    found.windows = dict(keras_windows(config))
    configured = _configured(config)
    for group in _texts(described, "layer_names"):
        place = f"{root}/{group}" if root else group
        if place not in nodes:
            continue
        arrays: dict[str, dict[str, StoredTensor]] = {}
        for name in _texts(file.attributes(nodes[place]), "weight_names"):
            node = nodes.get(f"{place}/{name}")
            tensor = None if node is None else file.tensor(node)
            if tensor is not None:
                owner, _, leaf = name.rpartition("/")
                arrays.setdefault(owner, {})[re.sub(r":\d+$", "", leaf)] = tensor
        for owner, roles in arrays.items():
            own = owner.rpartition("/")[2]
            name = legacy_name(group, own, is_alone=len(arrays) == 1)
            if is_batch_norm(roles):
                found.add(name, roles, configured(group, own))
            else:
                found.tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in roles.items()}
    return found.network()


def legacy_name(group: str, own: str, *, is_alone: bool) -> str:
    """What a layer is called whose arrays are `own/gamma:0` in a group: the name of the group is the layer's.

    A network that was made twice in one process has `bn_1/gamma:0` in the group `bn`; another name is that of
    a layer inside the one that the group is for.
    """
    is_same = own in (group, "") or (is_alone and re.fullmatch(re.escape(group) + r"_\d+", own) is not None)
    return group if is_same else f"{group}.{own}"


def _texts(attributes: Mapping[str, Any], name: str) -> list[str]:
    """A list of texts: what is too long for one attribute, Keras divides into `name0`, `name1`, ..."""
    parts = [attributes[name]] if name in attributes else []
    number = 0
    while not parts or number:
        part = attributes.get(f"{name}{number}")
        if part is None:
            break
        parts.append(part)
        number += 1
    return [text for part in parts if isinstance(part, list) for text in part if isinstance(text, str)]


def _configured(content: Mapping[str, Any]) -> Callable[[str, str], LayerConfig | None]:
    """Tells what the configuration says of the layer `own` within the network's layer `group`."""
    layers: dict[str, list[LayerConfig]] = {}
    for _, layer in _by_group(content):
        if layer.is_batch_norm:
            layers.setdefault(layer.name.partition(".")[0], []).append(layer)

    def find(group: str, own: str) -> LayerConfig | None:
        inside = layers.get(group, [])
        same = [layer for layer in inside if layer.name.rpartition(".")[2] == own] or inside
        return same[0] if len(same) == 1 else None

    return find
