"""Where in a checkpoint the state dict lies: under `state_dict`, `model`, `ema`, ... or at the top.

Every dict that holds tensors is a candidate, and every pickled module. Chosen is the one with the most
BatchNorm layers; of several with equally many an exponential moving average (`ema`, `model_ema`,
`state_dict_ema`), because it is the one meant for evaluation and what Ultralytics and timm load; otherwise
the outermost, then the first.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

from bncli.batchnorm import Hyperparameters
from bncli.batchnorm.state_dict import batch_norm_names
from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.formats.foreign_network import ForeignNetwork
from bncli.checkpoints.formats.inert_pickle import Global, Inert, walk
from bncli.checkpoints.formats.pickled_module import is_module, is_uninitialised, read_module
from bncli.checkpoints.formats.window import Window
from bncli.checkpoints.stored_tensor import StoredTensor
from bncli.errors import NoBatchNormError
from bncli.wording import list_names, plural

MAX_DEPTH = 6
MAX_CONTAINERS = 20_000
MAX_KEY = 200  # characters of one key on the way
MAX_LISTED = 16  # elements of a list that are looked into
MAX_PREFIXES = 20
# what wrappers put before every name: DistributedDataParallel, torch.compile, Lightning and habit
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
HABITS = ("model.", "net.", "network.", "state_dict.")
_NONE = "no BatchNorm layer with running statistics in it"
_EMA = re.compile(r"(^|[._])ema($|[._])")


class NothingToReadError(UnreadableFileError):
    """What a sound file holds in place of BatchNorm layers."""

    public = NoBatchNormError


@dataclass(frozen=True)
class Candidate:
    """A place in a checkpoint that holds tensors."""

    key: str
    num_tensors: int
    num_batch_norm_layers: int


@dataclass
class StateDict:
    """The tensors of one place, and what a pickled module tells beyond them."""

    key: str
    tensors: dict[str, StoredTensor]
    layer_names: list[str]  # of BatchNorm layers, in file order or module order
    hyperparameters: dict[str, Hyperparameters] = field(default_factory=dict)
    is_whole_module: bool = False
    prefix: str = ""  # what every name in the file has before those here
    notes: tuple[str, ...] = ()  # as in OpenCheckpoint
    windows: Mapping[str, Window] = field(default_factory=dict)  # as in ForeignNetwork
    uninitialised: tuple[str, ...] = ()  # BatchNorm layers that are lazy still, under their names in the file

    @property
    def candidate(self) -> Candidate:
        """Its summary."""
        return Candidate(self.key, len(self.tensors), len(self.layer_names))


def find_state_dicts(content: object) -> list[StateDict]:
    """All places that hold tensors, outermost first.

    Raises:
        UnreadableFileError: where a pickled module grows without bounds.
    """
    found = []
    seen: set[int] = set()
    level = [("", content)]
    for _ in range(MAX_DEPTH):
        following: list[tuple[str, object]] = []
        for key, value in level:
            if id(value) in seen or len(seen) > MAX_CONTAINERS:
                continue
            seen.add(id(value))
            if isinstance(value, ForeignNetwork):
                layers = dict(value.layers)
                tensors = dict(value.tensors)
                found.append(
                    StateDict(
                        key, tensors, list(layers), layers, True, notes=value.notes, windows=value.windows
                    )
                )
                continue
            if isinstance(value, Inert) and is_module(value):
                module = _from_module(key, value)
                found += [module] if module.tensors or module.layer_names or module.uninitialised else []
                continue
            for part in (value.attributes, value.items) if isinstance(value, Inert) else (value,):
                found += _from_container(key, part)
                following += _inside(key, part, seen)
        level = following[:MAX_CONTAINERS]
    return found


def _from_container(key: str, value: object) -> list[StateDict]:
    if not isinstance(value, dict):
        return []
    tensors = {str(name): part for name, part in value.items() if isinstance(part, StoredTensor)}
    lazy = tuple(
        str(name).removesuffix("running_mean").removesuffix(".")
        for name, part in value.items()
        if str(name).rpartition(".")[2] == "running_mean" and is_uninitialised(part)
    )
    return [StateDict(key, tensors, batch_norm_names(tensors), uninitialised=lazy)] if tensors else []


def _inside(key: str, value: object, seen: set[int]) -> list[tuple[str, object]]:
    """The containers that a container holds, with their keys."""
    parts: Iterable[tuple[str, object]] = ()
    if isinstance(value, dict):
        parts = ((str(name), part) for name, part in value.items())
    elif isinstance(value, list | tuple):
        parts = ((str(index), part) for index, part in enumerate(value[:MAX_LISTED]))
    containers = (
        (f"{key}.{name}" if key else name, part)
        for name, part in parts
        if isinstance(part, dict | list | tuple | Inert | ForeignNetwork)
        and id(part) not in seen
        and len(name) <= MAX_KEY
    )
    return list(islice(containers, MAX_CONTAINERS))


def choose(state_dicts: list[StateDict], key: str | None) -> StateDict:
    """The state dict under `key`; without one, by the rule at the top of this file.

    Raises:
        UnreadableFileError: when there is none under the key, or none with BatchNorm.
    """
    if key is not None:
        for state_dict in state_dicts:
            if state_dict.key == key:
                return _with_batch_norm(state_dict)
        raise UnreadableFileError(
            f"no tensors under the key {key!r}; there are {describe_candidates(state_dicts)}"
        )
    most = max(len(state_dict.layer_names) for state_dict in state_dicts)
    if most == 0:
        return _with_batch_norm(max(state_dicts, key=lambda found: len(found.tensors)))
    tied = [state_dict for state_dict in state_dicts if len(state_dict.layer_names) == most]
    return next((found for found in tied if _EMA.search(found.key)), tied[0])


def describe_candidates(state_dicts: list[StateDict]) -> str:
    """The candidates with the most BatchNorm layers, in words."""
    best = sorted(state_dicts, key=lambda found: (-len(found.layer_names), -len(found.tensors)))
    words = [
        f"{found.key or 'the top'} ({plural(len(found.layer_names), 'BatchNorm layer')},"
        f" {plural(len(found.tensors), 'tensor')})"
        for found in best[:6]
    ]
    return ", ".join(words) + (", ..." if len(best) > 6 else "") if words else "no tensors anywhere"


def strip_prefixes(state_dict: StateDict) -> StateDict:
    """Without the prefixes that every tensor has, again and again; so no two names become one.

    The names of a pickled module are the module's own: only what wrappers put there is taken away.
    """
    prefixes = WRAPPERS if state_dict.is_whole_module else WRAPPERS + HABITS
    names = [*state_dict.tensors, *(f"{name}." for name in state_dict.hyperparameters)]
    length = 0
    for _ in range(MAX_PREFIXES):
        length += len(_common_prefix(names, length, prefixes))
    return replace(
        state_dict,
        prefix=names[0][:length] if names else "",
        tensors={name[length:]: tensor for name, tensor in state_dict.tensors.items()},
        layer_names=[name[length:] for name in state_dict.layer_names],
        hyperparameters={name[length:]: known for name, known in state_dict.hyperparameters.items()},
    )


def _common_prefix(names: list[str], start: int, prefixes: tuple[str, ...]) -> str:
    """One of the prefixes that every name has at `start`, with something behind it."""
    for prefix in prefixes:
        end = start + len(prefix)
        if names and all(name.startswith(prefix, start) and len(name) > end for name in names):
            return prefix
    return ""


def _from_module(key: str, value: Inert) -> StateDict:
    module = read_module(value)
    with_statistics = {name for name in batch_norm_names(module.tensors) if name not in module.instance_norms}
    layers = [name for name in module.names if name in with_statistics or name in module.hyperparameters]
    lazy = tuple(module.uninitialised)
    return StateDict(
        key, module.tensors, layers, module.hyperparameters, is_whole_module=True, uninitialised=lazy
    )


def _with_batch_norm(state_dict: StateDict) -> StateDict:
    if state_dict.layer_names:
        return state_dict
    if state_dict.uninitialised:
        raise NothingToReadError(
            f"{plural(len(state_dict.uninitialised), 'BatchNorm layer')}, not yet initialised"
            f" ({list_names(state_dict.uninitialised, 3)}); compute a batch with the network, then save it"
        )
    names = ", ".join(name[:60] for name in list(state_dict.tensors)[:3])
    where = f" under {state_dict.key}" if state_dict.key else ""
    count = len(state_dict.tensors)
    such_as = "" if count == 1 else "such as "
    raise NothingToReadError(f"{_NONE}, but {plural(count, 'tensor')}{where}, {such_as}{names}")


def describe_without_names(content: object) -> str:
    """What a file holds in which no tensor has a name: nothing, a bare tensor or a list, NumPy's arrays."""
    shapes, has_arrays = [], False
    for node in walk(content):
        if isinstance(node, StoredTensor):
            shapes.append(node.shape)
        has_arrays |= isinstance(node, Global) and node.module.startswith("numpy")
    if shapes:
        first = f"of shape {shapes[0]}" if len(shapes) == 1 else f"the first of shape {shapes[0]}"
        return f"{_NONE}, but {plural(len(shapes), 'tensor')} without a name, {first}"
    if has_arrays:
        return f"{_NONE}, but arrays of NumPy; save them as tensors (torch.from_numpy) in a state dict"
    return f"{_NONE}, and no tensor at all"
