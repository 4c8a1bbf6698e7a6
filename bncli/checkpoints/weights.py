"""The tensors of anybody's checkpoint, loaded into a network by name.

Names are compared first and all problems are told at once; then each tensor goes from the file into the
network's own memory, a piece at a time, its checksum computed on the way. So no second copy of the network
is ever in memory. What `load_state_dict` accepts is accepted: another floating point type is converted, and
`num_batches_tracked` may be missing, as in files from before PyTorch 0.4.1.
"""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bncli.batchnorm.conventions import ONNX
from bncli.batchnorm.layers import AVERAGED_KEY
from bncli.checkpoints.any_content import named, without_collector
from bncli.checkpoints.any_file import OpenCheckpoint, open_checkpoint
from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.stored_tensor import StoredTensor
from bncli.errors import CheckpointError
from bncli.wording import list_names, plural

COUNTER = "num_batches_tracked"
MAX_CHILDREN = 20  # of the network, each maybe the network that the file is of
MAX_COMPARED = 1000  # names that one name is compared with
MAX_SHOWN = 4  # names of a kind, in an error
MAX_NAME = 80  # characters of a name, in an error
_WHOLE = "name with --model the network that the file is of"  # a remedy, where no part can be loaded
NOT = "!"  # before a glob: all but these


class MismatchError(CheckpointError):
    """A checkpoint whose tensors are not those of the network; the network is as it was."""


@dataclass(frozen=True)
class LoadedWeights:
    """What was loaded from where."""

    source: str
    kind: str  # of the file, as `OpenCheckpoint.kind`
    key: str  # where the state dict lies, dotted; '' for the top
    num_tensors: int  # of the network
    names: Mapping[str, str]  # of each loaded tensor in the network: its name in the file, prefixes included
    kept: tuple[str, ...]  # tensors of the network that the file did not give: they are as they were
    left_over: tuple[str, ...]  # tensors of the file that the network does not have
    others: tuple[str, ...] = ()  # other keys where BatchNorm layers lie, where none was asked for

    @property
    def num_loaded(self) -> int:
        """Of the network's tensors; those that share memory with a loaded one are loaded with it."""
        return self.num_tensors - len(self.kept)

    @property
    def sentence(self) -> str:
        """In words: "loaded 122 of 122 tensors"."""
        text = f"loaded {self.num_loaded:,} of {plural(self.num_tensors, 'tensor')}"
        if self.others:
            others = _listed([other or "the top" for other in self.others])
            text += f" of {self.key or 'the top'} (--key KEY takes those of {others})"
        if self.kept:
            text += f"; as they were: {_listed(self.kept)}"
        if self.left_over:
            text += f"; left out: {_listed(self.left_over)}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "kind": self.kind,
            "key": self.key,
            "num_loaded": self.num_loaded,
            "num_tensors": self.num_tensors,
            "kept": list(self.kept),
            "left_over": list(self.left_over),
        }


def load_weights(
    model: nn.Module,
    source: str | Path | OpenCheckpoint,
    *,
    key: str | None = None,
    partial: Sequence[str] | None = (),
) -> LoadedWeights:
    """Load a checkpoint of any kind into a network, in place; nothing in the file is executed.

    `key` says where the state dict lies, as for `open_checkpoint`. `partial` has globs of names, such as
    `layer4.*` for this part alone or `!fc.*` for all but that: only what they mean is loaded, and has to be
    there; the rest of the network stays as it was. With None no error advises to load a part.

    Raises:
        MismatchError: a tensor is missing, left over, or of another shape or type, or none is to be loaded;
            nothing was changed.
        CheckpointError: the file cannot be read, or is damaged; found on the way, the network is half loaded.
    """
    if not isinstance(source, OpenCheckpoint):
        with open_checkpoint(source, key) as checkpoint:
            loaded = load_weights(model, checkpoint, partial=partial)
            keys = [one.key for one in checkpoint.candidates] if key is None else []
            return replace(loaded, others=tuple(one for one in keys if one != loaded.key))
    state = model.state_dict(keep_vars=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    with named(source.source), without_collector():
        try:
            match = _match(tensors, source.tensors, partial)
        except _MisfitError:
            framework = source.foreign_framework
            if framework is None or partial:
                raise
            raise _MisfitError(
                f"a file of {framework}, with other tensors than the network;"
                f" {_remedy_of_framework(source.source, framework)}"
            ) from None
        with torch.no_grad():
            for name, origin in match.names.items():
                source.tensors[origin].copy_into(tensors[name].detach())
    return LoadedWeights(
        source=source.source,
        kind=source.kind,
        key=source.key,
        num_tensors=len(tensors),
        names={name: source.prefix + origin for name, origin in match.names.items()},
        kept=match.kept,
        left_over=match.left_over,
    )


@dataclass(frozen=True)
class _Match:
    names: dict[str, str]  # in the network: in the file
    kept: tuple[str, ...]
    left_over: tuple[str, ...]


class _MisfitError(UnreadableFileError):
    public = MismatchError


def _match(
    tensors: Mapping[str, Tensor], stored: Mapping[str, StoredTensor], partial: Sequence[str] | None
) -> _Match:
    """Which tensor of the file goes into which of the network; raises _MisfitError unless all fit."""
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    if lazy:
        raise _MisfitError(
            f"the network has tensors without a shape yet, {_listed(lazy)}; compute a"
            " batch with it before it is loaded"
        )
    only = [glob for glob in partial or () if not glob.startswith(NOT)]
    excluded = [glob.removeprefix(NOT) for glob in partial or () if glob.startswith(NOT)]

    def is_meant(name: str) -> bool:
        return (not only or _matches(only, name)) and not _matches(excluded, name)

    considered = [name for name in stored if not _matches(excluded, name)]
    origins = _aligned([name for name in tensors if is_meant(name)], considered)
    _check_globs([*only, *excluded], list(dict.fromkeys([*tensors, *stored, *origins])))
    names = {name: origins[name] for name in tensors if name in origins and is_meant(name)}
    loaded = {id(tensors[name]) for name in names}
    absent = [name for name in tensors if name not in names and id(tensors[name]) not in loaded]
    spare = {name: origin for name, origin in origins.items() if name not in names}
    problems = _Problems(
        missing=[name for name in absent if is_meant(name) and name.rpartition(".")[2] != COUNTER],
        left_over=[name for name in spare if is_meant(name) and not _is_bookkeeping(name, tensors)],
        wrong=[name for name, origin in names.items() if not _fits(stored[origin], tensors[name])],
    )
    if problems or not names:
        remedy = _WHOLE if partial is None else _remedy(problems, names)
        raise _MisfitError(_describe(problems, names, origins, tensors, stored, remedy))
    return _Match(names, tuple(absent), tuple(name for name in stored if name not in set(names.values())))


def _remedy_of_framework(path: str, framework: str) -> str:
    """What to do with a file whose tensors have names and axes of another framework."""
    if framework.startswith(ONNX.framework):
        return "give the checkpoint that it was exported from"
    return f"run bncli convert {path} -o NEW.pt --model NAME first, and give NEW.pt"


@dataclass(frozen=True)
class _Problems:
    missing: list[str]  # names of the network
    left_over: list[str]  # of the file, as the network would call them
    wrong: list[str]  # of both

    def __bool__(self) -> bool:
        return bool(self.missing or self.left_over or self.wrong)


def _matches(globs: Sequence[str], name: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _check_globs(globs: Sequence[str], names: Sequence[str]) -> None:
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise _MisfitError(
                f"no tensor of the file or the network matches {glob!r}; there are {_listed(names)}"
            )


def _aligned(wanted: Sequence[str], found: Sequence[str]) -> dict[str, str]:
    """The names in a file as the network would call them, each with what it is called in the file.

    A wrapper may stand before the names of the file or of the network: `module.`, `model.`, `backbone.`. Of
    all prefixes that one is exchanged which gives the most names of the network, if it gives most of them.
    """
    first = wanted[0].split(".") if wanted else []
    common = [f"{'.'.join(first[:length])}." for length in range(1, len(first))]
    children = dict.fromkeys(f"{name.partition('.')[0]}." for name in wanted)
    of_network = dict.fromkeys(
        [
            "",
            *(prefix for prefix in common if all(name.startswith(prefix) for name in wanted)),
            *list(children)[:MAX_CHILDREN],
        ]
    )
    known, hits = set(wanted), Counter[tuple[str, str]]()
    for name in found:
        starts = [0, *(index + 1 for index, char in enumerate(name) if char == ".")]
        hits.update(
            (name[:start], prefix)
            for start in starts
            for prefix in of_network
            if prefix + name[start:] in known
        )
    best, there = max(hits, key=lambda pair: (hits[pair], -len(pair[0]) - len(pair[1])), default=("", ""))
    if 2 * hits[best, there] <= min(len(wanted), len(found)):  # another network has some names in common
        best = there = ""
    return {there + name.removeprefix(best) if name.startswith(best) else name: name for name in found}


def _is_bookkeeping(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor of the file is a count that the network can do without."""
    layer, _, leaf = name.rpartition(".")
    return name == AVERAGED_KEY or (leaf == COUNTER and f"{layer}.running_mean".lstrip(".") in tensors)


def _fits(stored: StoredTensor, tensor: Tensor) -> bool:
    """Whether `load_state_dict` would take it, and no number would be lost but by rounding."""
    have, want = stored.dtype, tensor.dtype
    if stored.shape != tuple(tensor.shape):
        # counters of early versions of PyTorch have one dimension
        return tensor.ndim == 0 and stored.shape == (1,) and have == want
    if have.is_floating_point or have.is_complex or want.is_floating_point or want.is_complex:
        return have.is_complex == want.is_complex and have.is_floating_point == want.is_floating_point
    return have.itemsize <= want.itemsize


def _describe(
    problems: _Problems,
    names: Mapping[str, str],
    origins: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, StoredTensor],
    remedy: str,
) -> str:
    """All that does not fit, on one line, with what can be done."""
    if not names:
        return (
            f"none of its {plural(len(stored), 'tensor')} is one of the network's {len(tensors):,}: it has"
            f" {_listed(list(stored))}; the network has {_listed(list(tensors))}"
        )
    head = _head(problems, names, tensors, stored)
    if head is not None:
        layers, found, expected = head
        return (
            f"{_listed(layers)} has {found:,} classes in the file and {expected:,} in"
            f" the network; give --model-arg num_classes={found} if it takes that; {remedy}"
        )
    parts = [f"{len(names) - len(problems.wrong):,} of the network's {plural(len(tensors), 'tensor')} fit"]
    if problems.missing:
        shapes = {name: stored[origins[name]].shape for name in problems.left_over[:MAX_COMPARED]}
        shown = [_with_nearest(name, tensors[name], shapes) for name in problems.missing[:MAX_SHOWN]]
        parts.append(f"missing: {_first(shown, problems.missing)}")
    if problems.left_over:
        parts.append(f"left over: {_listed(problems.left_over)}")
    if problems.wrong:
        shown = [
            _both_shapes(name, stored[names[name]], tensors[name]) for name in problems.wrong[:MAX_SHOWN]
        ]
        parts.append(f"different: {_first(shown, problems.wrong)}")
    return f"does not fit the network: {'; '.join(parts)}; {remedy}"


def _listed(names: Sequence[str]) -> str:
    return list_names([_cut(name) for name in names], MAX_SHOWN)


def _cut(name: str) -> str:
    """A name that may come from a stranger."""
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 3] + "..."


def _first(shown: list[str], everything: Sequence[str]) -> str:
    more = f", ... ({len(everything):,} in all)" if len(everything) > len(shown) else ""
    return ", ".join(shown) + more


def _with_nearest(name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> str:
    alike = [other for other, shape in shapes.items() if shape == tuple(tensor.shape)]
    near = difflib.get_close_matches(name, alike, n=1, cutoff=0.4)
    return f"{_cut(name)} (the file has {_cut(near[0])})" if near else _cut(name)


def _both_shapes(name: str, stored: StoredTensor, tensor: Tensor) -> str:
    found, expected = (
        f"{str(one.dtype).removeprefix('torch.')} {tuple(one.shape)}" for one in (stored, tensor)
    )
    return f"{_cut(name)} is {found} in the file and {expected} in the network"


def _head(
    problems: _Problems,
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, StoredTensor],
) -> tuple[list[str], int, int] | None:
    """The last layers and both their numbers of classes, where that is all that is wrong."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in problems.wrong))
    numbers = set()
    for name in problems.wrong:
        found, expected = stored[names[name]].shape, tuple(tensors[name].shape)
        if not found or not expected or found[1:] != expected[1:] or found[0] == expected[0]:
            return None
        numbers.add((found[0], expected[0]))
    is_head = all(tensors.get(f"{layer}.weight", torch.empty(0)).ndim > 1 for layer in layers)
    if problems.missing or problems.left_over or len(numbers) != 1 or not is_head:
        return None
    return layers, *numbers.pop()


def _remedy(problems: _Problems, names: Mapping[str, str]) -> str:
    """Which option leaves out whatever does not fit."""
    troubled = [*problems.missing, *problems.left_over, *problems.wrong]
    sound = set(names).difference(problems.wrong)
    globs = list(dict.fromkeys(_narrow_glob(name, sound) for name in troubled))
    can_be_typed = all(len(glob) <= MAX_NAME and glob.isprintable() and "'" not in glob for glob in globs)
    if len(globs) > MAX_SHOWN or not can_be_typed:
        return "--partial GLOB loads a part"
    options = " ".join(f"--partial '{NOT}{glob}'" for glob in globs)
    return f"{options} loads the rest"


def _narrow_glob(name: str, sound: Iterable[str]) -> str:
    """The widest glob of a module that holds this tensor and none that fits."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length]) + "."
        if not any(other.startswith(prefix) for other in sound):
            return f"{prefix}*"
    return name
