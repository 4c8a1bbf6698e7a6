"""ONNX models: the BatchNormalization nodes that are left, and what tells of those that are not.

What an array is shows in where a node takes it in, not in its name: PyTorch merges arrays of equal content,
so that a mean of zeros may be called as another layer's bias. The layer's name is in the node's metadata,
else in its own. Reference: onnx/onnx.proto; the fields are read by position, arrays where they lie.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from bncli.batchnorm.conventions import ONNX, ONNX_OF_PYTORCH
from bncli.checkpoints.byte_source import ByteSource, UnreadableFileError
from bncli.checkpoints.formats.beside import storage_beside
from bncli.checkpoints.formats.collected_network import (
    Collected,
    are_statistics,
    contiguous,
    free_name,
    from_float32,
    listed,
)
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.protobuf import BYTES, FIXED_32, VARINT, Field, Wire
from bncli.checkpoints.locate import NothingToReadError
from bncli.checkpoints.stored_tensor import MAX_DIMENSIONS, Storage, StoredTensor
from bncli.wording import plural

MAX_DEPTH = 16  # of subgraphs and functions in each other
MAX_VISITED = 1_000_000  # nodes: a function may be called from many places
MAX_INPUTS = 10_000  # of one node
_LEAVES = ("weight", "bias", "running_mean", "running_var")  # of the inputs behind the first
_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
# in which field a tensor without raw data has its numbers, one after another as they lie in memory
_PACKED = {torch.float32: 4, torch.float64: 10}
_SCOPES, _RULE = "pkg.torch.onnx.name_scopes", "pkg.onnxscript.rewriter.rule_name"
_FOLDING_RULE = re.compile(r"Fuse\w*BatchNorm")
_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
_RENAMED = re.compile(r"onnx::(Conv|ConvTranspose|Gemm)_\d+")


def read_if_onnx(file: ByteSource, start: bytes) -> tuple[str, ForeignNetwork] | None:
    """An ONNX model; None for another file.

    Raises:
        UnreadableFileError: on damage, and where its external data is missing.
        NothingToReadError: when no BatchNormalization is left in it; says what became of it.
    """
    if start[:1] != b"\x08":
        return None
    wire = Wire(file)
    top = _top_fields(wire)
    if top is None:
        return None
    return "onnx", _Model(wire, top).network()


def _top_fields(wire: Wire) -> list[Field] | None:
    """The model's fields, if it is one: it begins with a version up to 100, and has a graph (7)."""
    found: list[Field] = []
    try:
        for one in wire.fields():
            if one.number not in (*range(1, 9), 14, 20, 25, 26) or len(found) > MAX_INPUTS:
                return None
            if not found and not (one.number == 1 and one.kind == VARINT and 1 <= one.value <= 100):
                return None
            found.append(one)
    except UnreadableFileError:
        if not any(one.number == 7 and one.kind == BYTES for one in found):
            if not any(one.number == 8 and one.kind == BYTES for one in found) and len(found) < 3:
                return None
            raise UnreadableFileError("a damaged or truncated ONNX model: it has no whole graph") from None
        raise
    numbers = {one.number for one in found if one.kind == BYTES}
    return found if 7 in numbers else None


@dataclass
class _Node:
    """What is of interest of a node."""

    op_type: str = ""
    name: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, Field] = field(default_factory=dict)  # by name
    metadata: dict[str, str] = field(default_factory=dict)


class _Model:
    def __init__(self, wire: Wire, top: list[Field]) -> None:
        self._wire = wire
        self._top = top
        self._network = Collected()
        self._producer = ""
        self._opset = 0
        self._functions: dict[tuple[str, str], Field] = {}
        self._num_visited = 0
        self._op_types: Counter[str] = Counter()
        self._folded: list[str] = []
        self._training: list[str] = []
        self._computed: list[str] = []
        self._called: Counter[str] = Counter()
        self._inputs: dict[str, list[str]] = {}  # names of the arrays of a layer
        self._used: set[int] = set()  # identities of the initialisers that BatchNorm takes in
        self._initialisers: dict[str, StoredTensor] = {}

    def network(self) -> ForeignNetwork:
        """All layers, then all other initialisers of the main graph."""
        wire = self._wire
        for one in self._top:
            if one.number == 2:
                self._producer = wire.text(one)
            elif one.number == 8 and one.kind == BYTES:
                self._read_opset(one)
            elif one.number == 25 and one.kind == BYTES:
                self._read_function(one)
        for one in self._top:
            if one.number == 7:
                self._graph(one, {}, 0)
        if not self._network.layers:
            raise NothingToReadError(self._what_is_left())
        unused = {name: tensor for name, tensor in self._initialisers.items() if id(tensor) not in self._used}
        self._network.add_others(unused)
        self._network.notes += self._notes()
        return self._network.network()

    @property
    def _is_of_pytorch(self) -> bool:
        return self._producer == "pytorch"

    def _read_opset(self, message: Field) -> None:
        domain, version = "", 0
        for one in self._wire.inside(message):
            if one.number == 1:
                domain = self._wire.text(one)
            elif one.number == 2 and one.kind == VARINT:
                version = one.value
        if domain in ("", "ai.onnx"):
            self._opset = version

    def _read_function(self, message: Field) -> None:
        name = domain = ""
        for one in self._wire.inside(message):
            if one.number == 1:
                name = self._wire.text(one)
            elif one.number == 10:
                domain = self._wire.text(one)
        self._functions[domain, name] = message

    def _graph(self, message: Field, around: Mapping[str, StoredTensor], depth: int) -> None:
        """A graph with its arrays; the names of the graphs around it are known in it."""
        known = dict(around)
        nodes: list[Field] = []
        for one in self._wire.inside(message):
            if one.number == 1:
                nodes.append(one)
            elif one.number == 5:
                name, tensor = self._tensor(one)
                if tensor is not None and name:
                    known[name] = tensor
                    if depth == 0:
                        self._initialisers[name] = tensor
        self._nodes(nodes, known, depth)

    def _nodes(self, messages: list[Field], known: dict[str, StoredTensor], depth: int) -> None:
        if depth > MAX_DEPTH:
            raise UnreadableFileError("a damaged file: graphs that are nested without end")
        for message in messages:
            self._num_visited += 1
            if self._num_visited > MAX_VISITED:
                raise UnreadableFileError(f"a graph of more than {MAX_VISITED:,} nodes")
            node = self._node(message)
            self._op_types[node.op_type] += 1
            if _FOLDING_RULE.search(node.metadata.get(_RULE, "")):
                self._folded.append(self._layer_name(node))
            if node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx"):
                self._batch_norm(node, known)
            elif node.op_type == "Identity" and node.inputs and node.outputs:
                if node.inputs[0] in known:
                    known[node.outputs[0]] = known[node.inputs[0]]
            elif node.op_type == "Constant" and node.outputs and "value" in node.attributes:
                for one in self._wire.inside(node.attributes["value"]):
                    tensor = self._tensor(one)[1] if one.number == 5 else None
                    if tensor is not None:
                        known[node.outputs[0]] = tensor
            self._inner(node, known, depth)

    def _inner(self, node: _Node, known: dict[str, StoredTensor], depth: int) -> None:
        """The bodies of a node (If, Loop), and that of the function that it calls."""
        for attribute in node.attributes.values():
            for one in self._wire.inside(attribute):
                if one.number in (6, 11) and one.kind == BYTES:
                    self._graph(one, known, depth + 1)
        function = self._functions.get((node.domain, node.op_type))
        if function is None:
            return
        names, nodes = [], []
        for one in self._wire.inside(function):
            if one.number == 4:
                names.append(self._wire.text(one))
            elif one.number == 7:
                nodes.append(one)
        given = {
            name: known[value] for name, value in zip(names, node.inputs, strict=False) if value in known
        }
        self._nodes(nodes, given, depth + 1)

    def _node(self, message: Field) -> _Node:
        node, wire = _Node(), self._wire
        for one in wire.inside(message):
            if one.number == 1:
                node.inputs.append(wire.text(one))
            elif one.number == 2:
                node.outputs.append(wire.text(one))
            elif one.number == 3:
                node.name = wire.text(one)
            elif one.number == 4:
                node.op_type = wire.text(one)
            elif one.number == 5:
                name = next((wire.text(part) for part in wire.inside(one) if part.number == 1), "")
                node.attributes[name] = one
            elif one.number == 7:
                node.domain = wire.text(one)
            elif one.number == 9:
                key, value = self._entry(one)
                if key in (_SCOPES, _RULE):
                    node.metadata[key] = value
            if len(node.inputs) + len(node.outputs) > MAX_INPUTS:
                raise UnreadableFileError(f"a node with more than {MAX_INPUTS:,} inputs")
        return node

    def _entry(self, message: Field) -> tuple[str, str]:
        """Key and value of a text; a long value, such as a stack trace, is left out."""
        key = value = ""
        for one in self._wire.inside(message):
            if one.number == 1:
                key = self._wire.text(one)
            elif one.number == 2 and one.size <= 2**15:
                value = self._wire.text(one)
        return key, value

    def _number(self, node: _Node, name: str, default: float) -> float:
        """A float (2) or whole (3) attribute."""
        if name in node.attributes:
            for one in self._wire.inside(node.attributes[name]):
                if one.number == 2 and one.kind == FIXED_32:
                    return from_float32(one.as_float)
                if one.number == 3 and one.kind == VARINT:
                    return float(one.value)
        return default

    def _batch_norm(self, node: _Node, known: Mapping[str, StoredTensor]) -> None:
        arrays = [known.get(name) if name else None for name in node.inputs[1:5]]
        parts = {leaf: tensor for leaf, tensor in zip(_LEAVES, arrays, strict=False) if tensor is not None}
        if not are_statistics(parts.get("running_mean"), parts.get("running_var")):
            parts.pop("running_mean", None), parts.pop("running_var", None)
        name = self._layer_name(node)
        if not parts:
            self._computed.append(name)
            return
        features = parts.get("running_mean", next(iter(parts.values()))).num_elements
        parts = {leaf: tensor for leaf, tensor in parts.items() if tensor.num_elements == features}
        again = self._earlier_call(name, node, parts)
        if again is not None:
            self._called[again] += 1
            return
        name = free_name(name, self._network.layers)
        if "running_mean" not in parts:
            self._computed.append(name)
        if self._number(node, "training_mode", 0) or (self._opset < 14 and sum(map(bool, node.outputs)) > 1):
            self._training.append(name)
        momentum: float | None = self._number(node, "momentum", ONNX.default_momentum)
        if self._is_of_pytorch and momentum == 1:
            momentum = None  # what PyTorch writes for a cumulative average in eval mode
        self._used |= {id(tensor) for tensor in parts.values()}
        self._inputs[name] = node.inputs[1:5]
        self._network.add(
            name,
            parts,
            ONNX_OF_PYTORCH if self._is_of_pytorch else ONNX,
            num_features=features,
            eps=self._number(node, "epsilon", ONNX.default_eps),
            momentum=momentum,
        )

    def _earlier_call(self, name: str, node: _Node, parts: Mapping[str, StoredTensor]) -> str | None:
        """The layer that a node is one more call of: of that name with these arrays.

        TorchScript's exporter puts a number behind the name of the second call: `bn_1`.
        """
        if _SCOPES not in node.metadata:
            first = re.sub(r"_\d{1,9}$", "", name)
            return next((one for one in (name, first) if self._inputs.get(one) == node.inputs[1:5]), None)
        known = self._network.tensors
        same = name in self._network.layers and all(
            (one := known.get(f"{name}.{leaf}")) is not None and one.storage is tensor.storage
            for leaf, tensor in parts.items()
        )
        return name if same else None

    def _layer_name(self, node: _Node) -> str:
        scopes: list[str] = [one or other for one, other in _QUOTED.findall(node.metadata.get(_SCOPES, ""))]
        if len(scopes) >= 2 and scopes[-2]:
            return scopes[-2]
        name = node.name or (node.outputs[0] if node.outputs else "") or "BatchNormalization"
        if not self._is_of_pytorch or not name.startswith("/"):
            return name
        found: list[str] = []  # /layer1/layer1.0/bn1/BatchNormalization_1
        for part in name.strip("/").split("/")[:-1]:
            if found and part.startswith(f"{found[-1]}."):
                found[-1] = part
            else:
                found.append(part)
        return ".".join(found) or name

    def _tensor(self, message: Field) -> tuple[str, StoredTensor | None]:  # noqa: PLR0912
        """Name and array of a TensorProto; None for a type that bncli does not read, or numbers in text."""
        wire, name, shape = self._wire, "", list[int]()
        kind = location = 0
        raw: Field | None = None
        packed: dict[int, Field] = {}
        external: dict[str, str] = {}
        for one in wire.inside(message):
            if one.number == 1:
                shape += wire.numbers(one, MAX_DIMENSIONS)
            elif one.number == 2:
                kind = one.value
            elif one.number in (4, 10) and one.kind == BYTES:
                packed[one.number] = one
            elif one.number == 8:
                name = wire.text(one)
            elif one.number == 9 and one.kind == BYTES:
                raw = one
            elif one.number == 13:
                key, value = self._entry(one)
                external[key] = value
            elif one.number == 14:
                location = one.value
            if len(shape) > MAX_DIMENSIONS:
                raise UnreadableFileError("a damaged file: a tensor with too many dimensions")
        dtype = _DTYPES.get(kind)
        if dtype is None:
            return name, None
        if location == 1:
            storage = self._external(external)
        else:
            place = raw or packed.get(_PACKED.get(dtype, -1))
            if place is None:
                return name, None
            storage = _storage(wire.source, place)
        return name, contiguous(storage, dtype, tuple(shape))

    def _external(self, entries: Mapping[str, str]) -> Storage:
        offset, length = entries.get("offset", "0"), entries.get("length")
        numbers = [offset] if length is None else [offset, length]
        if not all(number.isascii() and number.isdecimal() and len(number) < 20 for number in numbers):
            raise UnreadableFileError("a damaged file: a tensor without a proper place in another file")
        return storage_beside(
            self._wire.source,
            entries.get("location", ""),
            int(offset),
            None if length is None else int(length),
        )

    # ---- what is said

    def _notes(self) -> Iterator[str]:
        if self._folded:
            yield (
                f"{plural(len(self._folded), 'BatchNorm layer')} more ({listed(self._folded)}) had been"
                " folded into other layers when it was exported; those layers' weights keep their names"
            )
        elif self._has_renamed:
            yield "the exporter folded some BatchNorm layers into convolutions (weights named onnx::Conv_...)"
        if self._training:
            names = listed(self._training)
            yield f"layers in training mode, which normalise by the batch's own statistics: {names}"
        if self._computed:
            yield (
                "layers whose mean and variance are not stored but computed, from the batch as a rule:"
                f" {listed(self._computed)}"
            )
        if self._called:
            yield f"layers that are called more than once: {listed(self._called)}"

    @property
    def _has_renamed(self) -> bool:
        return self._is_of_pytorch and any(map(_RENAMED.fullmatch, self._initialisers))

    def _what_is_left(self) -> str:
        ops = ", ".join(f"{count} {name[:40]}" for name, count in self._op_types.most_common(4) if name)
        text = f"an ONNX model without BatchNormalization (it has {ops or 'no nodes'})"
        if self._folded:
            text += (
                f": {plural(len(self._folded), 'layer')} of it ({listed(self._folded)}) had been folded into"
                " the layers before when it was exported"
            )
        elif self._has_renamed:
            text += ": PyTorch's exporter folded it into convolutions (weights named onnx::Conv_...)"
        elif self._computed:
            text += " that has stored numbers"
        return f"{text}; give the checkpoint that it was exported from"


def _storage(source: ByteSource, place: Field) -> Storage:
    """The numbers where they lie in the model itself."""
    start = place.start
    return Storage(
        place.size,
        lambda first, size: source.read_at(start + first, size),
        f"@{start}",
        position=lambda: start,
    )
