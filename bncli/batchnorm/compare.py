"""Two checkpoints of one network: how far its running statistics moved, and whether its weights did.

*Moved* means that a bit differs (`bncli.batchnorm.bits`): equal NaNs have not moved, and another dtype or
shape is another tensor. How far is another question, which `bncli.batchnorm.distance` answers; which weights
feed a layer is guessed from the order of the tensors.

A state dict keeps the order in which modules were registered, and that nearly always is the order of the
forward pass. So the tensors that stand between the BatchNorm layer before and a layer are taken to feed it:
the convolution, usually. Wrong where branches meet: the shortcut of a residual block is not counted.

A file whose names are sorted, as safetensors writes them, has lost that order.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from bncli.batchnorm.bits import bitwise_equal
from bncli.batchnorm.conventions import PYTORCH
from bncli.batchnorm.conversion import (
    Relation,
    eps_matters,
    momentum_is_inverted,
    pair_by_values,
    relate,
)
from bncli.batchnorm.distance import Divergence, DivergenceSummary, diverge, summarize_divergence
from bncli.batchnorm.layers import LayerStats
from bncli.batchnorm.moved_alone import MovedAlone, explain_moved_alone
from bncli.errors import IncomparableError
from bncli.wording import list_names, plural

STATISTICS_ALONE = "statistics_moved_weights_unchanged"  # flags of a layer, which `compare` explains
WEIGHTS_ALONE = "weights_moved_statistics_unchanged"
FROZEN_OR_STALE = (
    "Frozen BatchNorm keeps its statistics on purpose. Averaged, pruned, merged or quantised weights must"
    " not: their statistics are those of another network, and have to be measured again."
)


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """One BatchNorm layer in both checkpoints: the second's distance from the first."""

    name: str  # in the first
    name_in_second: str
    divergence: Divergence | None  # per channel; None where either has no running statistics
    summary: DivergenceSummary | None
    statistics_moved: bool  # running_mean or running_var
    weights_moved: bool  # its own weight or bias
    feeding_weights_moved: bool | None  # None: no tensor is known to feed it
    hyperparameters_changed: bool  # momentum or eps, where both know them
    num_batches_tracked: tuple[int | None, int | None]
    flags: tuple[str, ...]
    relation: Relation  # whether the second's numbers follow from the first's

    def to_dict(self, *, channels: bool = False) -> dict[str, Any]:
        """Its entry in the JSON document: plain values, and with `channels` tensors (C,)."""
        summary = self.summary or DivergenceSummary(num_incomparable=0)
        numbers = dict(vars(summary))
        num_incomparable = numbers.pop("num_incomparable")
        return {
            "name": self.name,
            "name_in_second": self.name_in_second,
            **numbers,
            "num_incomparable_channels": num_incomparable,
            "num_batches_tracked_first": self.num_batches_tracked[0],
            "num_batches_tracked_second": self.num_batches_tracked[1],
            "statistics_moved": self.statistics_moved,
            "weights_moved": self.weights_moved,
            "feeding_weights_moved": self.feeding_weights_moved,
            "hyperparameters_changed": self.hyperparameters_changed,
            "flags": self.flags,
            "relation": self.relation.kind,
            "values_per_channel": self.relation.values,
            **({"channels": self.divergence} if channels else {}),
        }

    def __str__(self) -> str:
        """One line."""
        flags = f" [{', '.join(self.flags)}]" if self.flags else ""
        return f"{self.name}: {self.summary or 'no running statistics in one or both'}{flags}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """The second checkpoint against the first, in the first's order."""

    identical: bool  # every tensor in every bit, and every hyperparameter that both know
    matched_by: Literal["name", "order", "values"]
    frameworks: tuple[str, str]  # whose conventions the files follow
    only_batch_norm: bool  # other tensors were not compared, as between frameworks
    conversion: tuple[str, ...]  # what was done on the way from the first to the second, a sentence each
    order_known: bool  # whether a file keeps the order of registration
    layers: tuple[LayerComparison, ...]
    only_in_first: tuple[str, ...]  # BatchNorm layers
    only_in_second: tuple[str, ...]
    different_num_features: tuple[str, ...]  # layers of one name but other channels: not compared
    num_tensors: int  # of any kind, that both have
    num_tensors_changed: int  # of these
    num_tensors_only_in_first: int
    num_tensors_only_in_second: int
    moved_alone: MovedAlone | None  # what is known where statistics moved and no weight did; None: nowhere

    @property
    def verdict(self) -> str:
        """What differs, in a sentence or two."""
        if self.only_batch_norm:
            return self._verdict_across()
        if self.identical:
            return f"Identical: all {self.num_tensors:,} tensors agree in every bit."
        parts = [f"{self.num_tensors_changed:,} of {self.num_tensors:,} tensors differ"]
        lone = {"first": self.num_tensors_only_in_first, "second": self.num_tensors_only_in_second}
        parts += [f"{count:,} only in the {which} file" for which, count in lone.items() if count]
        if changed := [layer.name for layer in self.layers if layer.hyperparameters_changed]:
            parts.append(f"other momentum or eps in {list_names(changed)}")
        moved = [
            (layer.summary.kl, layer.name) for layer in self.layers if layer.summary and layer.summary.kl
        ]
        moved.sort(key=lambda item: -item[0])
        most = ", ".join(name for _, name in moved[:3])
        return f"{'; '.join(parts)}." + (
            f" The statistics that moved farthest are in {most}." if most else ""
        )

    def _verdict_across(self) -> str:
        """In words; other tensors than those of BatchNorm cannot be compared between frameworks."""
        kinds = Counter(layer.relation.kind for layer in self.layers)
        num_same = kinds.pop("equal", 0) + kinds.pop("rounded", 0)
        layers = plural(len(self.layers), "BatchNorm layer")
        differences = (layer.relation.largest for layer in self.layers if layer.relation.kind == "rounded")
        largest = max(differences, default=0.0)
        within = f"within rounding (at most {largest:.2g})" if largest else "in every bit"
        if self.identical:
            return f"The same in {' and '.join(dict.fromkeys(self.frameworks))}: {layers}, {within}."
        parts = [f"{num_same:,} the same {within}"] if num_same else []
        parts += [f"{count:,} {_IN_WORDS[kind]}" for kind, count in kinds.items()]
        lone = len(self.only_in_first) + len(self.only_in_second)
        parts += [f"{lone:,} without a counterpart"] if lone else []
        return f"{self.frameworks[0]} against {self.frameworks[1]}, {layers}: {', '.join(parts)}."

    def flagged(self, flag: str) -> list[str]:
        """The names of the layers with that flag."""
        return [layer.name for layer in self.layers if flag in layer.flags]

    def to_dict(self, *, channels: bool = False) -> dict[str, Any]:
        """The JSON document; with `channels` every layer's numbers per channel."""
        alone = self.moved_alone
        return {
            "identical": self.identical,
            "verdict": self.verdict,
            "matched_by": self.matched_by,
            "frameworks": self.frameworks,
            "only_batch_norm": self.only_batch_norm,
            "conversion": self.conversion,
            "order_known": self.order_known,
            "num_layers": len(self.layers),
            "layers": [layer.to_dict(channels=channels) for layer in self.layers],
            "moved_alone": None if alone is None else alone.to_dict(),
            "only_in_first": self.only_in_first,
            "only_in_second": self.only_in_second,
            "different_num_features": self.different_num_features,
            "num_tensors": self.num_tensors,
            "num_tensors_changed": self.num_tensors_changed,
            "num_tensors_only_in_first": self.num_tensors_only_in_first,
            "num_tensors_only_in_second": self.num_tensors_only_in_second,
        }

    def __str__(self) -> str:
        """The verdict, and a line for each flag that a layer has."""
        lines = [
            f"{plural(len(self.layers), 'BatchNorm layer')} compared, matched by {self.matched_by}.",
            self.verdict,
            *self.conversion,
        ]
        for flag, text in self.explanations().items():
            lines.append(f"{flag} ({list_names(self.flagged(flag))}): {text}")
        return "\n".join(lines)

    def explanations(self) -> dict[str, str]:
        """What each flag that was raised means here."""
        texts = {STATISTICS_ALONE: str(self.moved_alone), WEIGHTS_ALONE: FROZEN_OR_STALE}
        return {flag: text for flag, text in texts.items() if self.flagged(flag)}


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
OWN_TENSORS = (*STATISTICS, "weight", "bias")


@dataclass(frozen=True)
class Feeding:
    """What stands before each BatchNorm layer."""

    tensors: Mapping[str, tuple[str, ...]]  # per layer, those that feed it
    position: Mapping[str, int]  # per name of a tensor, in the order of the forward pass
    start: Mapping[str, int]  # per layer, the position of its first tensor

    @property
    def first_layer(self) -> str | None:
        """The layer that no other is before; None without layers."""
        return min(self.start, key=lambda layer: self.start[layer], default=None)


def find_feeding(names: Sequence[str], layers: Collection[str]) -> Feeding:
    """Read it off the names in the order of registration; `layers` are the names of BatchNorm layers."""
    tensors: dict[str, tuple[str, ...]] = {}
    start: dict[str, int] = {}
    known, since_last = set(layers), list[str]()
    for position, name in enumerate(names):
        layer = owner(name, known)
        if layer is None:
            since_last.append(name)
            continue
        if layer not in start:
            tensors[layer], start[layer] = tuple(since_last), position
        since_last.clear()
    return Feeding(tensors, {name: position for position, name in enumerate(names)}, start)


def owner(name: str, layers: Collection[str]) -> str | None:
    """The BatchNorm layer whose tensor this is."""
    layer, _, leaf = name.rpartition(".")
    return layer if leaf in OWN_TENSORS and layer in layers else None


def order_is_lost(dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether the names of tensors (with their types) are sorted within each type, as in safetensors.

    An affine BatchNorm registers its weight before its bias, so the order of registration is hardly ever
    that of the alphabet.
    """
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, dtype in dtypes.items():
        by_dtype.setdefault(dtype, []).append(name)
    return all(names == sorted(names) for names in by_dtype.values())


class ReadableTensor(Protocol):
    """A tensor in a file, of which only shape and dtype are known until it is read."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape, without reading it."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type, without reading it."""

    def chunks(self) -> Iterator[bytes]:
        """Its memory in row-major order; of one shape and dtype the chunks have the same sizes."""


class Contents(Protocol):
    """What a checkpoint holds: BatchNorm layers, and all tensors by name in the order of the file."""

    def layers(self) -> Sequence[LayerStats]:
        """Its BatchNorm layers."""

    @property
    def tensors(self) -> Mapping[str, ReadableTensor]:
        """Every tensor; a layer's own are called after it, as in 'bn1.running_mean'."""


def compare(first: Contents, second: Contents) -> Comparison:
    """Compare layer by layer and tensor by tensor; a chunk of each is in memory at a time.

    Layers are matched by name. Where no name agrees but the numbers of channels do, one after the other,
    they are matched by order; where that does not fit either, by their values: a layer of the second that was
    made from one of the first is its counterpart. `matched_by` says which. The flags of a layer:

    - 'statistics_moved_weights_unchanged': its statistics moved, though neither its own weights nor any
      before it did; where the order is unknown, nor any weight of the network. `moved_alone` tells what is
      known about the causes.
    - 'weights_moved_statistics_unchanged': its own weights or those that feed it moved, its statistics not.

    Raises IncomparableError when no layer has a counterpart.
    """
    layers = first.layers(), second.layers()
    frameworks = _framework(layers[0]), _framework(layers[1])
    matched_by, pairs = _match(*layers)
    names = _counterparts(first.tensors, second.tensors) if matched_by == "order" else {}
    changed, num_lone = _changed_tensors(first.tensors, second.tensors, names)
    order = _registration_order(first.tensors, {} if names else second.tensors)
    known = {layer.name for layer in layers[0]}
    feeding = None if order is None else find_feeding(order, known)
    moves = _WeightMoves(changed, known, feeding)
    lone = _lone(layers[0], pairs, side=0), _lone(layers[1], pairs, side=1)
    fitting = [(one, two) for one, two in pairs if one.num_features == two.num_features]
    # other tensors than those of BatchNorm have other names and shapes there
    across = frameworks[0] != frameworks[1] or (
        frameworks[0] != PYTORCH.framework and first.tensors.keys() != second.tensors.keys()
    )
    compared = tuple(_compare_layer(one, two, None if across else moves) for one, two in fitting)
    conversion = _describe_conversion(fitting, compared, always=across or matched_by == "values")
    if across:
        differing = not all(layer.relation.kind in ("equal", "rounded") for layer in compared)
    else:
        differing = any(changed.values())
    differing |= any(layer.hyperparameters_changed for layer in compared)
    return Comparison(
        identical=not differing and lone == ((), ()),
        matched_by=matched_by,
        frameworks=frameworks,
        only_batch_norm=across,
        conversion=conversion,
        order_known=order is not None,
        layers=compared,
        only_in_first=lone[0],
        only_in_second=lone[1],
        different_num_features=tuple(one.name for one, two in pairs if one.num_features != two.num_features),
        num_tensors=len(first.tensors) - num_lone[0],
        num_tensors_changed=sum(changed.values()) - sum(num_lone),
        num_tensors_only_in_first=num_lone[0],
        num_tensors_only_in_second=num_lone[1],
        moved_alone=None if across else _explain(fitting, compared, feeding),
    )


def _framework(layers: Sequence[LayerStats]) -> str:
    return layers[0].convention.framework if layers else "PyTorch"


def _describe_conversion(
    pairs: Sequence[tuple[LayerStats, LayerStats]], compared: Sequence[LayerComparison], *, always: bool
) -> tuple[str, ...]:
    """Sentences; none where nothing looks like a conversion, unless `always`."""
    by_kind: dict[str, list[LayerComparison]] = {}
    for layer in compared:
        by_kind.setdefault(layer.relation.kind, []).append(layer)
    marks = [text for kind, tell in _TELL.items() if kind in by_kind and (text := tell(by_kind[kind]))]
    inverted = [(one, two) for one, two in pairs if momentum_is_inverted(one, two)]
    if inverted:
        one, two = inverted[0]
        names = list_names([pair[0].name for pair in inverted])
        marks.append(
            f"momentum is {two.momentum:g} in the second, 1 minus the first's {one.momentum:g} ({names}): one"
            " of them weighs the old average; PyTorch's weighs the new batch."
        )
    if not marks and not always:
        return ()
    return (*marks, *_describe_eps(pairs, compared))


def _tell_bessel(layers: Sequence[LayerComparison]) -> str:
    counts = [layer.relation.values for layer in layers if layer.relation.values is not None]
    low, high = min(counts), max(counts)
    count = f"n = {low:,.0f}" if high <= 1.01 * low else f"n from {low:,.0f} to {high:,.0f}"
    which = "second" if layers[0].relation.second_is_unbiased else "first"
    return (
        f"Bessel's correction ({list_names([layer.name for layer in layers])}): the {which} file's variances"
        f" are n / (n - 1) times the other's, in every channel, with {count} values per channel; means,"
        " weights and biases are the same."
    )


def _tell_swapped(layers: Sequence[LayerComparison]) -> str:
    names = list_names([layer.name for layer in layers])
    return f"Mean and variance stand in each other's place ({names}); weights and biases are the same."


def _tell_permuted(layers: Sequence[LayerComparison]) -> str:
    texts = []
    for layer in layers:
        axes = layer.relation.axes
        how = "" if axes is None else f" (as of an array {axes} whose axes were exchanged)"
        texts.append(f"{layer.name}{how}")
    return f"The same channels in another order: {list_names(texts)}."


_IN_WORDS = {
    "bessel": "the same but for Bessel's correction",
    "swapped": "with mean and variance exchanged",
    "permuted": "with channels in another order",
    "different": "with other numbers",
    "unknown": "without statistics in one file",
}
_TELL = {"bessel": _tell_bessel, "swapped": _tell_swapped, "permuted": _tell_permuted}


def _describe_eps(
    pairs: Sequence[tuple[LayerStats, LayerStats]], compared: Sequence[LayerComparison]
) -> list[str]:
    """What another eps alone does to the outputs of the copies; an unknown one is the framework's default."""
    found = [
        (off, one, two)
        for (one, two), layer in zip(pairs, compared, strict=True)
        if layer.relation.is_copy and (off := eps_matters(one, two)) is not None
    ]
    if not found:
        return []
    off, one, two = max(found, key=lambda item: item[0])
    words = [
        f"{layer.eps_or_default:g}{' (assumed)' if layer.eps is None else ''} in the {which}"
        for which, layer in (("first", one), ("second", two))
    ]
    return [
        f"eps is {' and '.join(words)}: with equal statistics, outputs differ by up to {100 * off:.2g} %"
        f" (in {one.name})."
    ]


def _explain(
    pairs: Sequence[tuple[LayerStats, LayerStats]],
    compared: Sequence[LayerComparison],
    feeding: Feeding | None,
) -> MovedAlone | None:
    """What is known of those layers whose statistics moved alone."""
    moved = [
        (one, two, found.divergence)
        for (one, two), found in zip(pairs, compared, strict=True)
        if STATISTICS_ALONE in found.flags
    ]
    name = None if feeding is None else feeding.first_layer
    first = (
        (one, two, found.divergence)
        for (one, two), found in zip(pairs, compared, strict=True)
        if one.name == name
    )
    return explain_moved_alone(moved, first_layer=name, first=next(first, None))


def _lone(
    layers: Sequence[LayerStats], pairs: Sequence[tuple[LayerStats, LayerStats]], *, side: Literal[0, 1]
) -> tuple[str, ...]:
    matched = {pair[side].name for pair in pairs}
    return tuple(layer.name for layer in layers if layer.name not in matched)


def _match(
    first: Sequence[LayerStats], second: Sequence[LayerStats]
) -> tuple[Literal["name", "order", "values"], list[tuple[LayerStats, LayerStats]]]:
    by_name = {layer.name: layer for layer in second}
    pairs = [(layer, by_name[layer.name]) for layer in first if layer.name in by_name]
    if pairs:
        return "name", pairs
    in_order = list(zip(first, second, strict=False))
    if len(first) == len(second) and all(one.num_features == two.num_features for one, two in in_order):
        num_copies = sum(relate(one, two).is_copy for one, two in in_order)
        by_values = [] if num_copies == len(in_order) else pair_by_values(first, second)
        if first and len(by_values) <= num_copies:
            return "order", in_order
    else:
        by_values = pair_by_values(first, second)
    if by_values:
        return "values", by_values
    raise IncomparableError(
        f"no BatchNorm layer of the first ({_examples(first)}) has a counterpart in the second"
        f" ({_examples(second)}), neither by name nor by the order of their channels, nor by its values"
    )


def _examples(layers: Sequence[LayerStats]) -> str:
    shown = ", ".join(f"{layer.name} with {layer.num_features}" for layer in layers[:3])
    return f"{len(layers)}: {shown}" + (", ..." if len(layers) > 3 else "")


def _counterparts(
    first: Mapping[str, ReadableTensor], second: Mapping[str, ReadableTensor]
) -> dict[str, str]:
    """The tensors' names in the second, by their names in the first, where the shapes agree in order."""
    shapes = [[tuple(tensor.shape) for tensor in tensors.values()] for tensors in (first, second)]
    return dict(zip(first, second, strict=True)) if shapes[0] == shapes[1] else {}


def _changed_tensors(
    first: Mapping[str, ReadableTensor], second: Mapping[str, ReadableTensor], names: Mapping[str, str]
) -> tuple[dict[str, bool], tuple[int, int]]:
    """Which tensors differ, by their names in the first; and how many are only in one, which counts too."""
    changed = {}
    for name, tensor in first.items():
        other = second.get(names.get(name, name))
        changed[name] = other is None or not _equal(tensor, other)
    found = {names.get(name, name) for name in first}
    only_in_second = [name for name in second if name not in found]
    num_only_in_first = sum(name not in second for name in found)
    return changed | dict.fromkeys(only_in_second, True), (num_only_in_first, len(only_in_second))


def _equal(first: ReadableTensor, second: ReadableTensor) -> bool:
    if tuple(first.shape) != tuple(second.shape) or first.dtype != second.dtype:
        return False  # without reading either
    return all(one == two for one, two in zip(first.chunks(), second.chunks(), strict=True))


def _registration_order(*candidates: Mapping[str, ReadableTensor]) -> list[str] | None:
    for tensors in candidates:
        if not order_is_lost({name: tensor.dtype for name, tensor in tensors.items()}):
            return list(tensors)
    return None


class _WeightMoves:
    """Which weights moved, seen from a layer."""

    def __init__(self, changed: Mapping[str, bool], layers: set[str], feeding: Feeding | None) -> None:
        weights = [name for name, moved in changed.items() if moved and not _is_statistic(name, layers)]
        self._moved = set(weights)
        self._feeding = feeding
        self._earliest = (
            None
            if feeding is None
            else min((feeding.position.get(name, 0) for name in weights), default=len(feeding.position))
        )

    def feeding(self, layer: str) -> bool | None:
        """Whether one of those that feed it moved; None where none is known."""
        tensors = () if self._feeding is None else self._feeding.tensors.get(layer, ())
        return any(name in self._moved for name in tensors) if tensors else None

    def before(self, layer: str) -> bool:
        """Whether one before it moved; where the order is unknown, whether any did."""
        if self._feeding is None or self._earliest is None or layer not in self._feeding.start:
            return bool(self._moved)
        return self._earliest < self._feeding.start[layer]


def _is_statistic(name: str, layers: set[str]) -> bool:
    return owner(name, layers) is not None and name.rpartition(".")[2] in STATISTICS


def _compare_layer(first: LayerStats, second: LayerStats, moves: _WeightMoves | None) -> LayerComparison:
    """Without `moves`, as between frameworks, nothing is said of the weights before a layer."""
    statistics_moved = _moved(first.running_mean, second.running_mean) or _moved(
        first.running_var, second.running_var
    )
    weights_moved = _moved(first.weight, second.weight) or _moved(first.bias, second.bias)
    feeding_moved = None if moves is None else moves.feeding(first.name)
    has_statistics = first.running_mean is not None and second.running_mean is not None
    flags = {
        STATISTICS_ALONE: statistics_moved
        and moves is not None
        and not (weights_moved or moves.before(first.name)),
        WEIGHTS_ALONE: (weights_moved or bool(feeding_moved)) and not statistics_moved and moves is not None,
    }
    divergence = diverge(first, second)
    both_known = first.hyperparameters_known and second.hyperparameters_known
    return LayerComparison(
        name=first.name,
        name_in_second=second.name,
        divergence=divergence,
        summary=None if divergence is None else summarize_divergence(divergence),
        statistics_moved=statistics_moved,
        weights_moved=weights_moved,
        feeding_weights_moved=feeding_moved,
        hyperparameters_changed=both_known and (first.momentum, first.eps) != (second.momentum, second.eps),
        num_batches_tracked=(first.num_batches_tracked, second.num_batches_tracked),
        flags=tuple(flag for flag, found in flags.items() if found and has_statistics),
        relation=relate(first, second),
    )


def _moved(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return (first is None) != (second is None)
    return not bitwise_equal(first, second)
