"""The BatchNorm layers of a TensorFlow checkpoint.

Since TensorFlow 2 a checkpoint holds the graph of the objects that own its variables. The keys of variables
do not tell what a variable is: after `fit`, gamma and beta may lie under the optimizer's keys, and an
exported network has every variable twice, in different orders. So a layer is an object with the children
moving_mean and moving_variance, wherever their numbers lie; where there are only variables (exported
networks, TensorFlow 1) their names tell.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from bncli.batchnorm.conventions import KERAS_2, KERAS_2_OR_3, KERAS_3, TENSORFLOW_1, Convention
from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.keras_batch_norm import (
    LEAVES,
    RENORM,
    Found,
    LayerConfig,
    is_batch_norm,
    natural_order,
)
from bncli.checkpoints.formats.protobuf import fields, inside, text
from bncli.checkpoints.formats.safetensors_file import parse_json
from bncli.checkpoints.formats.tensorflow_bundle import Bundle
from bncli.checkpoints.formats.tensorflow_first import FirstFormat
from bncli.checkpoints.stored_tensor import StoredTensor
from bncli.wording import list_names

MAX_OBJECTS = 300_000
MAX_CHILDREN = 3_000_000
_AVERAGED = "/ExponentialMovingAverage"
_VALUE = "VARIABLE_VALUE"
# a place in a list of layers, which says less than a name
_NUMBERED = re.compile(r"(^|/)(_operations|_layers|layer_with_weights-\d+|layer-\d+|variables)(/|$)")


@dataclass
class Node:
    """An object: those that it holds by name, and its variable where it is one."""

    children: list[tuple[str, int]] = field(default_factory=list)
    full_name: str = ""
    key: str = ""  # of the variable's numbers


def read_layers(
    bundle: Bundle | FirstFormat, configs: Mapping[int, object], order: Mapping[str, int]
) -> ForeignNetwork:
    """The network of a checkpoint.

    Args:
        bundle: its tensors.
        configs: what keras_metadata.pb says of an object, by the object's number.
        order: the place of a variable in the graph of TensorFlow 1, by its name, where that is known.

    Raises:
        UnreadableFileError: on damage.
    """
    graph = bundle.object_graph()
    if graph is None:
        return _by_names(bundle, order)
    nodes = parse_graph(graph)
    return _Reader(bundle, nodes, configs).network()


def parse_graph(graph: bytes) -> list[Node]:
    """The objects of a TrackableObjectGraph; children are sound numbers.

    Raises:
        UnreadableFileError: when it is damaged, or has far too many objects.
    """
    nodes = []
    left = MAX_CHILDREN
    for number, part in fields(graph):
        if number != 1 or isinstance(part, int):
            continue
        node = Node()
        for kind, inner in fields(part):
            if isinstance(inner, int) or kind not in (1, 2):
                continue
            values = dict(fields(inner))
            if kind == 1:
                node.children.append((text(values.get(2, 0)), _integer(values.get(1, 0))))
                left -= 1
            elif text(values.get(1, 0)) == _VALUE:
                node.full_name, node.key = text(values.get(2, 0)), text(values.get(3, 0))
        nodes.append(node)
        if len(nodes) > MAX_OBJECTS or left < 0:
            raise UnreadableFileError("a graph of far too many objects")
    if any(child >= len(nodes) for node in nodes for _, child in node.children):
        raise UnreadableFileError("a damaged file: its graph of objects points beyond its end")
    return nodes


def _integer(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise UnreadableFileError("a damaged file: its graph of objects is none")
    return value


def _walk(nodes: list[Node]) -> Iterator[int]:
    """The objects in the order in which the network holds them, each once."""
    seen: set[int] = set()
    stack = [0] if nodes else []
    while stack:
        number = stack.pop()
        if number in seen:
            continue
        seen.add(number)
        yield number
        children = nodes[number].children
        if any(name == "variables" for name, _ in children):
            # Keras' export lists all of them once more, as other objects, in another order in every run
            children = [(name, child) for name, child in children if name != "_all_variables"]
        stack += [child for _, child in reversed(children)]


class _Reader:
    """Goes through the objects of a checkpoint."""

    def __init__(
        self, bundle: Bundle | FirstFormat, nodes: list[Node], configs: Mapping[int, object]
    ) -> None:
        self._bundle, self._nodes, self._configs = bundle, nodes, configs
        self._found = Found(_convention_of(nodes))
        self._notes: list[str] = []

    def network(self) -> ForeignNetwork:
        """The layers, then all other variables by their names."""
        walked = list(_walk(self._nodes))
        layers = {number: owned for number in walked if (owned := self._owned(number))}
        owners = Counter(self._owner(owned) for owned in layers.values())
        for number, owned in layers.items():
            name = self._owner(owned)
            if owners[name] > 1:  # of a class of somebody's, whose name stands before all its variables
                path = self._nodes[owned["moving_mean"]].key.partition("/moving_mean")[0]
                name = name if _NUMBERED.search(path) else path
            self._add(number, owned, name)
        taken = {at for owned in layers.values() for at in owned.values()}
        self._take_named([number for number in walked if number not in taken])
        return self._found.network(tuple(self._notes))

    def _variable(self, number: int | None) -> StoredTensor | None:
        key = "" if number is None else self._nodes[number].key
        return self._bundle.tensor(key) if key in self._bundle.entries else None

    def _owned(self, number: int) -> dict[str, int]:
        """The variables of an object that is a layer, by what they are; empty for all else."""
        children = dict(reversed(self._nodes[number].children))
        owned = {leaf: children[leaf] for leaf in (*LEAVES, *RENORM) if leaf in children}
        roles = {leaf: tensor for leaf, at in owned.items() if (tensor := self._variable(at)) is not None}
        return {leaf: owned[leaf] for leaf in roles} if is_batch_norm(roles) else {}

    def _owner(self, owned: Mapping[str, int]) -> str:
        mean = self._nodes[owned["moving_mean"]]
        return mean.full_name.rpartition("/")[0] or mean.key.partition("/moving_mean")[0]

    def _add(self, number: int, owned: Mapping[str, int], name: str) -> None:
        roles = {leaf: tensor for leaf, at in owned.items() if (tensor := self._variable(at)) is not None}
        config = self._configs.get(number)
        known = LayerConfig.of(config) if isinstance(config, dict) else None
        # only tf.keras 2 keeps the axis as a list, which is an object
        is_keras_2 = any(own == "axis" for own, _ in self._nodes[number].children)
        self._found.add(_dotted(name), roles, known, KERAS_2 if is_keras_2 else None)

    def _take_named(self, numbers: list[int]) -> None:
        """Variables that no object owns as a layer does."""
        variables = []
        for number in numbers:
            tensor, node = self._variable(number), self._nodes[number]
            if tensor is None:
                continue
            owner, _, leaf = _without_number(node.full_name or node.key).rpartition("/")
            if owner and leaf in (*LEAVES, *RENORM):
                variables.append((owner, leaf, tensor))
                continue
            name = _without_number(node.full_name)
            if not name or name in self._found.tensors:
                name = node.key.removesuffix(f"/.ATTRIBUTES/{_VALUE}")
            self._found.tensors[name] = tensor
        orphans = set()
        for owner, roles in _by_owner(variables):
            if is_batch_norm(roles):
                self._found.add(_dotted(owner), roles, None)
            else:
                orphans.add(owner)
                self._found.tensors |= {f"{owner}/{leaf}": tensor for leaf, tensor in roles.items()}
        lost = [name for name in self._found.layers if name.partition("#")[0].replace(".", "/") in orphans]
        if lost:
            self._notes.append(
                f"{lost[0]}: several layers have this name, and the file does not say whose weight and bias"
                " are whose"
            )


def _by_owner(
    variables: list[tuple[str, str, StoredTensor]],
) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
    """Variables with the layer's name and what they are, by layer.

    Where several layers have one name, those that follow one another belong together: gamma, beta, mean.
    """
    ranks = {leaf: rank for rank, leaf in enumerate((*LEAVES, *RENORM))}
    counts = Counter((owner, leaf) for owner, leaf, _ in variables)
    repeated = {owner for (owner, _), count in counts.items() if count > 1}
    groups: dict[tuple[str, int], dict[str, StoredTensor]] = {}
    place, before, rank = 0, "", 0
    for owner, leaf, tensor in variables:
        if owner != before or ranks[leaf] <= rank:
            place += 1
        before, rank = owner, ranks[leaf]
        groups.setdefault((owner, place if owner in repeated else 0), {})[leaf] = tensor
    for (owner, _), roles in groups.items():
        yield owner, roles


def _convention_of(nodes: list[Node]) -> Convention:
    """Which Keras wrote it, by what its objects hold."""
    names = {name for node in nodes for name, _ in node.children}
    if {"keras_api", "layer_with_weights-0"} & names:
        return KERAS_2
    if {"_operations", "_losses_override", "call_signature_parameters", "_kernel"} & names:
        return KERAS_3
    root = dict(nodes[0].children) if nodes else {}
    listed, all_of_them = root.get("variables"), root.get("_all_variables")
    if listed is not None and all_of_them is not None:
        same = {at for _, at in nodes[listed].children} & {at for _, at in nodes[all_of_them].children}
        return KERAS_2 if same else KERAS_3
    return KERAS_2_OR_3


def _without_number(name: str) -> str:
    return re.sub(r":\d+$", "", name)


def _dotted(name: str) -> str:
    """As bncli calls layers inside networks: the names of Keras' variables have slashes."""
    return name.replace("/", ".")


# ---- TensorFlow 1: names and nothing else


def _by_names(bundle: Bundle | FirstFormat, order: Mapping[str, int]) -> ForeignNetwork:
    found = Found(TENSORFLOW_1)
    groups: dict[str, list[str]] = {}
    for key in bundle.entries:
        owner, _, leaf = key.rpartition("/")
        if leaf in (*LEAVES, *RENORM):
            groups.setdefault(owner, []).append(leaf)
    placed = all(
        f"{owner}/moving_mean" in order for owner, leaves in groups.items() if "moving_mean" in leaves
    )

    def place(owner: str) -> tuple[int, list[tuple[str, int]]]:
        return (order.get(f"{owner}/moving_mean", 0) if placed else 0, natural_order(owner))

    used: set[str] = set()
    for owner in sorted(groups, key=place):
        keys = {leaf: f"{owner}/{leaf}" if owner else leaf for leaf in groups[owner]}
        roles = {leaf: tensor for leaf, key in keys.items() if (tensor := bundle.tensor(key)) is not None}
        if is_batch_norm(roles):
            found.add(owner, roles, None)
            used |= set(keys.values())
    averaged = 0
    for key in bundle.entries:
        tensor = None if key in used else bundle.tensor(key)
        if tensor is not None:
            found.tensors[key] = tensor
            averaged += key.removesuffix(_AVERAGED) in used
    notes = []
    if found.layers and not placed:
        notes.append("layers are in the order of their names: a checkpoint of TensorFlow 1 has no other")
    if isinstance(bundle, FirstFormat) and bundle.divided:
        notes.append(
            f"left out, as they are divided: {list_names(list(bundle.divided))}; TensorFlow's own Saver puts"
            " them together and writes them in its second format"
        )
    if averaged:
        notes.append(
            f"{averaged} of these arrays have a moving average over the training steps beside them"
            f" (...{_AVERAGED}), which its author may have evaluated with; bncli reads the arrays themselves"
        )
    return found.network(tuple(notes))


def parse_metadata(content: bytes) -> dict[int, object]:
    """What keras_metadata.pb says of each BatchNorm layer, by the number of its object.

    Raises:
        UnreadableFileError: when it is damaged.
    """
    known: dict[int, object] = {}
    for part in inside([content], 1):
        values = dict(fields(part))
        _note_config(known, _integer(values.get(2, 0)), values.get(5))
    return known


def parse_old_metadata(saved_model: bytes) -> dict[int, object]:
    """The same of a saved_model.pb itself, where TensorFlow 2.0 to 2.4 put it.

    Raises:
        UnreadableFileError: when it is damaged.
    """
    known: dict[int, object] = {}
    for number, node in enumerate(inside([saved_model], 2, 7, 1)):  # meta graph, object graph, object
        for user_object in inside([node], 4):
            _note_config(known, number, dict(fields(user_object)).get(3))
    return known


def _note_config(known: dict[int, object], number: int, words: int | memoryview | None) -> None:
    if words is None or isinstance(words, int) or len(known) >= MAX_OBJECTS:
        return
    data = bytes(words)
    if b"moving_mean_initializer" in data:  # no other layer is asked for
        known[number] = parse_json(data)
