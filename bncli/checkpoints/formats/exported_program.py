"""Programs of torch.export (`.pt2`): a zip archive with tensors, and in JSON the graph that computes them.

Three layouts: `data/weights/NAME_weights_config.json` tells for each tensor its file, a raw storage that it
may be a view of (torch 2.9 and later); `data/weights/NAME.pt` is one state dict (2.8);
`serialized_state_dict.pt` lies beside `serialized_exported_program.json` (before). Types have numbers of
their own. The graph holds eps and momentum of every call of BatchNorm, and tells it from what only has the
same names.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from bncli.batchnorm import Hyperparameters
from bncli.batchnorm.state_dict import batch_norm_names
from bncli.checkpoints.byte_source import ByteSource, ForeignFileError, UnreadableFileError
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.pickled_module import checked_hyperparameters
from bncli.checkpoints.formats.safetensors_file import parse_json
from bncli.checkpoints.formats.torch_zip import ZipArchive, read_torch_archive
from bncli.checkpoints.stored_tensor import StoredTensor, stored_tensor
from bncli.wording import list_names, plural

KIND = "torch exported program"
MAX_JSON = 32 * 2**20  # bytes
MAX_MODELS = 100
# torch/_export/serde/schema.py: not the numbers that PyTorch has elsewhere
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
    28: torch.uint16,
    29: torch.float8_e4m3fn,
    30: torch.float8_e5m2,
    31: torch.float8_e4m3fnuz,
    32: torch.float8_e5m2fnuz,
    34: torch.uint32,
    35: torch.uint64,
}
_STRIDED = 7  # of the layouts
_CONFIG, _LEGACY = "_weights_config.json", "serialized_exported_program.json"
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def read_if_exported(archive: ZipArchive) -> tuple[str, object] | None:
    """The network, or several by name; None for another archive.

    Raises:
        UnreadableFileError: on damage.
        ForeignFileError: for a package without an exported program.
    """
    if _LEGACY in archive.entries:
        return KIND, _legacy(archive)
    marker = next((name for name in archive.entries if name.endswith("/archive_format")), None)
    if marker is None:
        return None
    folder = marker.removesuffix("archive_format")
    models = [
        name.removeprefix(f"{folder}models/").removesuffix(".json")
        for name in archive.entries
        if name.startswith(f"{folder}models/") and name.endswith(".json")
    ]
    if not models:
        raise ForeignFileError(
            "a package of PyTorch (.pt2) without an exported program, as AOTInductor compiles it; give the"
            " checkpoint that it was made from"
        )
    archive.check_byte_order(folder)
    networks = {name: _network_of(archive, folder, name) for name in models[:MAX_MODELS]}
    return KIND, next(iter(networks.values())) if len(networks) == 1 else networks


def _network_of(archive: ZipArchive, folder: str, name: str) -> ForeignNetwork:
    weights = f"{folder}data/weights/"
    config = archive.entries.get(f"{weights}{name}{_CONFIG}")
    if config is not None:
        said = _json(archive, config.filename).get("config")
        if not isinstance(said, dict):
            raise _damaged()
        tensors = dict(_tensors(archive, weights, said))
    elif f"{weights}{name}.pt" in archive.entries:
        tensors = _state_dict(archive, f"{weights}{name}.pt")
    else:
        raise UnreadableFileError(f"a damaged file: the tensors of its program {name[:80]} are missing")
    return _network(tensors, _graph(archive, f"{folder}models/{name}.json"))


def _legacy(archive: ZipArchive) -> ForeignNetwork:
    state = "serialized_state_dict.pt"
    if state not in archive.entries:
        raise ForeignFileError(
            "a program of torch.export of an early version; load it with the torch that wrote it, and save"
            " its state_dict"
        )
    return _network(_state_dict(archive, state), _graph(archive, _LEGACY))


# ---- tensors


def _tensors(
    archive: ZipArchive, folder: str, config: Mapping[str, object]
) -> Iterator[tuple[str, StoredTensor]]:
    """Of every entry of the configuration; without those of a shape that is not fixed, or sparse."""
    for name, entry in config.items():
        about: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
        file = archive.entries.get(f"{folder}{about.get('path_name')}")
        if file is None:
            raise UnreadableFileError(f"a damaged file: the numbers of {name[:80]} are missing")
        if about.get("use_pickle") is True:
            content = _torch_file(archive, file.filename)
            if isinstance(content, StoredTensor):
                yield name, content
            continue
        meta = about.get("tensor_meta")
        if not isinstance(meta, dict):
            raise _damaged()
        dtype = _DTYPES.get(meta["dtype"]) if type(meta.get("dtype")) is int else None
        sizes, strides = _numbers(meta.get("sizes")), _numbers(meta.get("strides"))
        offsets = _numbers([meta.get("storage_offset")])
        if dtype is None or meta.get("layout") != _STRIDED or None in (sizes, strides, offsets):
            continue
        assert offsets is not None
        storage = archive.storage(file)
        yield name, stored_tensor(storage, dtype, offsets[0], sizes, strides)


def _numbers(values: object) -> tuple[int, ...] | None:
    """Of `[{"as_int": 5}, ...]`; None where one of them is an expression."""
    if not isinstance(values, list):
        return None
    found = tuple(value.get("as_int") if isinstance(value, dict) else None for value in values)
    return found if all(type(number) is int for number in found) else None  # type: ignore[return-value]


def _state_dict(archive: ZipArchive, name: str) -> dict[str, StoredTensor]:
    content = _torch_file(archive, name)
    if not isinstance(content, dict):
        raise _damaged()
    return {str(key): tensor for key, tensor in content.items() if isinstance(tensor, StoredTensor)}


def _torch_file(archive: ZipArchive, name: str) -> object:
    """What torch.save wrote into an entry."""
    info = archive.entries[name]
    inner = ByteSource(f"{archive.source.name}/{name}", info.file_size, partial(archive.read, info))
    return read_torch_archive(ZipArchive(inner, strictly=False))[1]


# ---- the graph


def _graph(archive: ZipArchive, name: str) -> Mapping[str, Any]:
    """The graph module; empty where it is too large to be of interest."""
    if archive.entries[name].file_size > MAX_JSON:
        return {}
    module = _json(archive, name).get("graph_module")
    return module if isinstance(module, dict) else {}


def _json(archive: ZipArchive, name: str) -> dict[str, object]:
    info = archive.entries[name]
    if info.file_size > MAX_JSON:
        raise UnreadableFileError(f"its {name[-80:]} has {info.file_size:,} bytes; bncli reads {MAX_JSON:,}")
    with archive.stream(info) as stream:
        return parse_json(stream.read())


def _network(tensors: Mapping[str, StoredTensor], module: Mapping[str, Any]) -> ForeignNetwork:
    ordered = _in_module_order(tensors)
    names = dict(_names_in_graph(module))
    layers: dict[str, Hyperparameters] = {}
    stored, others, cumulative = batch_norm_names(ordered), set[str](), list[str]()
    for target, inputs in _normalizations(module):
        found = {leaf: names.get(str(inputs.get(leaf))) for leaf in _TENSORS}
        known = next((name for name in found.values() if name is not None), None)
        if known is None or (found["running_mean"] is None and found["weight"] is None):
            continue
        layer = known.rpartition(".")[0]
        if "instance_norm" in target:
            others.add(layer)
        elif layer not in layers and known in ordered:
            momentum = inputs.get("momentum", inputs.get("exponential_average_factor"))
            about = checked_hyperparameters(
                ordered[known].num_elements, inputs.get("eps", inputs.get("epsilon")), momentum
            )
            if about is not None and found["running_mean"] is not None and momentum == 0:
                cumulative.append(layer or "the top")
                about = _without_momentum(about.num_features, about.eps)
            if about is not None:
                layers[layer] = about
    stored = [layer for layer in stored if layer not in others]
    unused = [layer for layer in stored if layer not in layers]
    path = "{}.running_mean" if stored != [""] else "{}running_mean"
    for layer in unused:
        layers[layer] = _without_momentum(ordered[path.format(layer)].num_elements, None)
    return ForeignNetwork(ordered, layers, tuple(_notes(module, unused, cumulative)))


def _without_momentum(num_features: int, eps: float | None) -> Hyperparameters:
    return Hyperparameters(num_features=num_features, eps=eps, momentum=None, momentum_known=False)


def _notes(module: Mapping[str, Any], unused: list[str], cumulative: list[str]) -> Iterator[str]:
    if not module:
        yield "its graph is too large to be read here: momentum and eps stay unknown"
    elif unused:
        yield (
            f"{plural(len(unused), 'layer')} ({list_names(unused, 4)}): no batch_norm of its graph takes in"
            " these statistics. They were folded into other layers, or are those of another kind of layer"
            " (frozen, InstanceNorm)"
        )
    if cumulative:
        yield (
            f"momentum is 0 in the graph of {list_names(cumulative, 4)}: torch.export writes momentum None"
            " (cumulative) so in eval mode"
        )


def _in_module_order(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Module by module: an exported program has all parameters first, then all buffers."""
    own: dict[str, list[str]] = {}
    # a module that comes again shows where those belong that come behind it and have only buffers
    first, behind, again = list[str](), dict[str, list[str]](), ""
    comes_again = False
    previous = None
    for name in tensors:
        module = name.rpartition(".")[0]
        if module in own and module != previous:
            again, comes_again = module, True
        elif module not in own and comes_again:
            behind.setdefault(again, []).append(module)
        elif module not in own:
            first.append(module)
        own.setdefault(module, []).append(name)
        previous = module
    modules = [one for module in first for one in (module, *behind.get(module, ()))]
    return {name: tensors[name] for module in modules for name in own[module]}


def _names_in_graph(module: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the graph calls each parameter and buffer, with its name in the network."""
    signature = module.get("signature")
    specs = signature.get("input_specs") if isinstance(signature, dict) else None
    for spec in specs if isinstance(specs, list) else ():
        for kind in ("parameter", "buffer"):
            about = spec.get(kind) if isinstance(spec, dict) else None
            if not isinstance(about, dict):
                continue
            argument, name = about.get("arg"), about.get(f"{kind}_name")
            if isinstance(argument, dict) and isinstance(name, str):
                yield str(argument.get("name")), name


def _normalizations(module: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every call of BatchNorm and InstanceNorm: the operator, and its inputs by their names."""
    graph = module.get("graph")
    nodes = graph.get("nodes") if isinstance(graph, dict) else None
    for node in nodes if isinstance(nodes, list) else ():
        target = node.get("target") if isinstance(node, dict) else None
        if isinstance(target, str) and ("batch_norm" in target or "instance_norm" in target):
            yield target, dict(_inputs(node.get("inputs")))


def _inputs(inputs: object) -> Iterator[tuple[str, object]]:
    for one in inputs if isinstance(inputs, list) else ():
        argument = one.get("arg") if isinstance(one, dict) else None
        if not isinstance(argument, dict):
            continue
        tensor = argument.get("as_tensor")
        value = tensor.get("name") if isinstance(tensor, dict) else argument.get("as_float")
        if value is not None:
            yield str(one.get("name")), value


def _damaged() -> UnreadableFileError:
    return UnreadableFileError("a damaged file: its tensors are not described")
