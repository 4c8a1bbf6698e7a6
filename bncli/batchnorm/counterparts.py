"""Which layer of one checkpoint is which of another.

Those of one name belong together. So do those of which one name ends in the other, as `block.bn` in `bn`, if
no third one could be meant: files of one network may name what is around a layer or not. What is left then
belongs together where one layer has the numbers of one other, and of no third. Where no layer has a namesake,
the order of all counts, or what their values say.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from bncli.batchnorm.conversion import MAX_PAIRS, pair_by_values, relate
from bncli.batchnorm.layers import LayerStats
from bncli.errors import IncomparableError

MatchedBy = Literal["name", "order", "values"]
Pairs = list[tuple[LayerStats, LayerStats]]


def match_layers(first: Sequence[LayerStats], second: Sequence[LayerStats]) -> tuple[MatchedBy, Pairs]:
    """The pairs in the first's order, and by what they were found.

    Raises:
        IncomparableError: where no layer has a counterpart.
    """
    named = {layer.name: layer for layer in second}
    pairs = [(layer, named[layer.name]) for layer in first if layer.name in named]
    if pairs:
        for belong in (_end_alike, _have_one_origin):
            pairs += _only_pairs(_without(first, pairs), _without(second, pairs), belong)
        place = {layer.name: index for index, layer in enumerate(first)}
        return "name", sorted(pairs, key=lambda pair: place[pair[0].name])
    by_end = _only_pairs(first, second, _end_alike)
    in_order = list(zip(first, second, strict=False))
    if len(first) == len(second) and all(one.num_features == two.num_features for one, two in in_order):
        if len(by_end) == len(first) and by_end != in_order:
            return "name", by_end
        num_copies = sum(relate(one, two).is_copy for one, two in in_order)
        by_values = [] if num_copies == len(in_order) else _by_values(first, second)
        if first and len(by_values) <= num_copies:
            return "order", in_order
    else:
        by_values = _by_values(first, second)
    if by_end and len(by_end) >= len(by_values):
        return "name", by_end
    if by_values:
        return "values", by_values
    raise IncomparableError(
        f"no BatchNorm layer of the first ({_examples(first)}) has a counterpart in the second"
        f" ({_examples(second)}), neither by name nor by the order of their channels, nor by its values"
    )


def _by_values(first: Sequence[LayerStats], second: Sequence[LayerStats]) -> Pairs:
    """Copies in the order of both, or those in any order if there are more of them."""
    in_order = pair_by_values(first, second)
    if len(in_order) == min(len(first), len(second)):
        return in_order
    return max(in_order, _only_pairs(first, second, _have_one_origin), key=len)


def _without(layers: Sequence[LayerStats], pairs: Pairs) -> list[LayerStats]:
    taken = {id(layer) for pair in pairs for layer in pair}
    return [layer for layer in layers if id(layer) not in taken]


def _only_pairs(
    first: Sequence[LayerStats],
    second: Sequence[LayerStats],
    belong: Callable[[LayerStats, LayerStats], bool],
) -> Pairs:
    """Pairs that belong together of which neither belongs to a third."""
    if len(first) * len(second) > MAX_PAIRS:
        return []
    pairs = [
        (one, two)
        for one in first
        for two in second
        if one.num_features == two.num_features and belong(one, two)
    ]
    counts = Counter(id(layer) for pair in pairs for layer in pair)
    return [pair for pair in pairs if counts[id(pair[0])] == counts[id(pair[1])] == 1]


def _end_alike(one: LayerStats, two: LayerStats) -> bool:
    """Whether one name is the end of the other, behind a dot."""
    shorter, longer = sorted((one.name, two.name), key=len)
    return shorter != "" and longer.endswith(f".{shorter}")


def _have_one_origin(one: LayerStats, two: LayerStats) -> bool:
    """Whether the second was made from the first; an untrained layer has the numbers of any other."""
    mean = one.running_mean
    return mean is not None and bool((mean != mean[0]).any()) and relate(one, two).is_copy


def _examples(layers: Sequence[LayerStats]) -> str:
    shown = ", ".join(f"{layer.name} with {layer.num_features}" for layer in layers[:3])
    return f"{len(layers)}: {shown}" + (", ..." if len(layers) > 3 else "")
