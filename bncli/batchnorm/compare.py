"""Two checkpoints of one network: how far its running statistics moved, and whether its weights did.

*Moved* means that a bit differs (`bncli.batchnorm.bits`): equal NaNs have not moved, and another dtype or
shape is another tensor. Of a tensor that only one file has, nothing is known. How far is another question,
which `bncli.batchnorm.distance` answers; which weights feed a layer is guessed from the order of the tensors
(`bncli.batchnorm.feeding`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from bncli.batchnorm.bits import bitwise_equal
from bncli.batchnorm.comparison import STATISTICS_ALONE, WEIGHTS_ALONE, Comparison, LayerComparison
from bncli.batchnorm.conventions import PYTORCH
from bncli.batchnorm.conversion import relate
from bncli.batchnorm.conversion_in_words import describe_conversion
from bncli.batchnorm.counterparts import match_layers
from bncli.batchnorm.distance import diverge, summarize_divergence
from bncli.batchnorm.feeding import OWN_TENSORS, Feeding, WeightMoves, find_feeding, order_is_lost
from bncli.batchnorm.layers import LayerStats
from bncli.batchnorm.moved_alone import MovedAlone, explain_moved_alone


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

    Layers are matched by name (`bncli.batchnorm.counterparts`). Where no name agrees but the numbers of
    channels do, one after the other, they are matched by order; where that does not fit either, by their
    values: a layer of the second that was made from one of the first is its counterpart. `matched_by` says
    which. The flags of a layer:

    - 'statistics_moved_weights_unchanged': its statistics moved, though neither its own weights nor any
      before it did; where the order is unknown, nor any weight of the network. `moved_alone` tells what is
      known about the causes.
    - 'weights_moved_statistics_unchanged': its own weights or those that feed it moved, its statistics not.

    Raises IncomparableError when no layer has a counterpart.
    """
    layers = first.layers(), second.layers()
    frameworks = _framework(layers[0]), _framework(layers[1])
    matched_by, pairs = match_layers(*layers)
    names = _names_in_second(first.tensors, second.tensors, pairs, in_order=matched_by == "order")
    changed, num_lone = _changed_tensors(first.tensors, second.tensors, names)
    order = _registration_order(first.tensors, {} if names else second.tensors)
    known = {layer.name for layer in layers[0]}
    feeding = None if order is None else find_feeding(order, known)
    moves = WeightMoves(changed, known, feeding)
    lone = _lone(layers[0], pairs, side=0), _lone(layers[1], pairs, side=1)
    fitting = [(one, two) for one, two in pairs if one.num_features == two.num_features]
    # other tensors than those of BatchNorm have other names and shapes there
    across = frameworks[0] != frameworks[1] or (
        frameworks[0] != PYTORCH.framework and first.tensors.keys() != second.tensors.keys()
    )
    compared = tuple(_compare_layer(one, two, None if across else moves) for one, two in fitting)
    conversion = describe_conversion(fitting, compared, always=across or matched_by == "values")
    if across:
        differing = not all(layer.relation.kind in ("equal", "rounded") for layer in compared)
    else:
        differing = any(changed.values()) or any(num_lone)
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
        num_tensors_changed=sum(moved is True for moved in changed.values()),
        num_tensors_only_in_first=num_lone[0],
        num_tensors_only_in_second=num_lone[1],
        moved_alone=None if across else _explain(fitting, compared, feeding),
    )


def _framework(layers: Sequence[LayerStats]) -> str:
    return layers[0].convention.framework if layers else "PyTorch"


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


def _names_in_second(
    first: Mapping[str, ReadableTensor],
    second: Mapping[str, ReadableTensor],
    pairs: Sequence[tuple[LayerStats, LayerStats]],
    *,
    in_order: bool,
) -> dict[str, str]:
    """The names of tensors in the second by those in the first, where these differ.

    Those of paired layers are known; where layers were matched in order, so are all whose shapes agree so.
    """
    if not in_order:
        return {
            f"{one.name}.{leaf}": f"{two.name}.{leaf}"
            for one, two in pairs
            for leaf in OWN_TENSORS
            if one.name != two.name and f"{one.name}.{leaf}" in first
        }
    shapes = [[tuple(tensor.shape) for tensor in tensors.values()] for tensors in (first, second)]
    return dict(zip(first, second, strict=True)) if shapes[0] == shapes[1] else {}


def _changed_tensors(
    first: Mapping[str, ReadableTensor], second: Mapping[str, ReadableTensor], names: Mapping[str, str]
) -> tuple[dict[str, bool | None], tuple[int, int]]:
    """Which tensors differ, by their names in the first; None for those of one file, and how many those."""
    changed: dict[str, bool | None] = {}
    for name, tensor in first.items():
        other = second.get(names.get(name, name))
        changed[name] = None if other is None else not _equal(tensor, other)
    found = {names.get(name, name) for name in first}
    only_in_second = [name for name in second if name not in found]
    num_only_in_first = sum(name not in second for name in found)
    return changed | dict.fromkeys(only_in_second), (num_only_in_first, len(only_in_second))


def _equal(first: ReadableTensor, second: ReadableTensor) -> bool:
    if tuple(first.shape) != tuple(second.shape) or first.dtype != second.dtype:
        return False  # without reading either
    return all(one == two for one, two in zip(first.chunks(), second.chunks(), strict=True))


def _registration_order(*candidates: Mapping[str, ReadableTensor]) -> list[str] | None:
    for tensors in candidates:
        if not order_is_lost({name: tensor.dtype for name, tensor in tensors.items()}):
            return list(tensors)
    return None


def _compare_layer(first: LayerStats, second: LayerStats, moves: WeightMoves | None) -> LayerComparison:
    """Without `moves`, as between frameworks, nothing is said of the weights before a layer."""
    statistics_moved = _moved(first.running_mean, second.running_mean) or _moved(
        first.running_var, second.running_var
    )
    own = (first.weight, second.weight), (first.bias, second.bias)
    weights_moved = any(_moved(one, two) for one, two in own if one is not None and two is not None)
    weights_known = all((one is None) == (two is None) for one, two in own)
    feeding_moved = None if moves is None else moves.feeding(first.name)
    has_statistics = first.running_mean is not None and second.running_mean is not None
    flags = {
        STATISTICS_ALONE: statistics_moved
        and moves is not None
        and weights_known
        and not (weights_moved or moves.may_be_before(first.name)),
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
