"""Which layer of one checkpoint is which of another.

Those of one name belong together. So do those of which one name ends in the other, as `block.bn` in `bn`, if
no third one could be meant: files of one network may name what is around a layer or not. Where no layer has
a namesake, the order of all counts, or what their values say.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

from bncli.batchnorm.conversion import pair_by_values, relate
from bncli.batchnorm.layers import LayerStats
from bncli.errors import IncomparableError

MatchedBy = Literal["name", "order", "values"]
Pairs = list[tuple[LayerStats, LayerStats]]


def match_layers(first: Sequence[LayerStats], second: Sequence[LayerStats]) -> tuple[MatchedBy, Pairs]:
    """The pairs in the first's order, and by what they were found.

    Raises:
        IncomparableError: where no layer has a counterpart.
    """
    pairs = _by_name(first, second)
    by_end = _by_end_of_name(first, second, pairs)
    if pairs:
        place = {layer.name: index for index, layer in enumerate(first)}
        return "name", sorted([*pairs, *by_end], key=lambda pair: place[pair[0].name])
    in_order = list(zip(first, second, strict=False))
    if len(first) == len(second) and all(one.num_features == two.num_features for one, two in in_order):
        if len(by_end) == len(first) and by_end != in_order:
            return "name", by_end
        num_copies = sum(relate(one, two).is_copy for one, two in in_order)
        by_values = [] if num_copies == len(in_order) else pair_by_values(first, second)
        if first and len(by_values) <= num_copies:
            return "order", in_order
    else:
        by_values = pair_by_values(first, second)
    if by_end and len(by_end) >= len(by_values):
        return "name", by_end
    if by_values:
        return "values", by_values
    raise IncomparableError(
        f"no BatchNorm layer of the first ({_examples(first)}) has a counterpart in the second"
        f" ({_examples(second)}), neither by name nor by the order of their channels, nor by its values"
    )


def _by_name(first: Sequence[LayerStats], second: Sequence[LayerStats]) -> Pairs:
    named = {layer.name: layer for layer in second}
    return [(layer, named[layer.name]) for layer in first if layer.name in named]


def _by_end_of_name(first: Sequence[LayerStats], second: Sequence[LayerStats], known: Pairs) -> Pairs:
    """Layers without a namesake whose names end alike up to the beginning of one of them, and no other's."""
    taken = {layer.name for pair in known for layer in pair}
    lone = [[layer for layer in layers if layer.name not in taken] for layers in (first, second)]
    candidates = {
        (one.name, two.name): (one, two)
        for longer, shorter, turned in ((lone[0], lone[1], False), (lone[1], lone[0], True))
        for pair in _ends(longer, shorter)
        for one, two in (reversed(pair) if turned else pair,)
    }
    partners: dict[tuple[int, str], set[str]] = defaultdict(set)
    for one_name, two_name in candidates:
        partners[0, one_name].add(two_name)
        partners[1, two_name].add(one_name)
    place = {layer.name: index for index, layer in enumerate(first)}
    return sorted(
        (
            pair
            for (one_name, two_name), pair in candidates.items()
            if len(partners[0, one_name]) == 1 and len(partners[1, two_name]) == 1
        ),
        key=lambda pair: place[pair[0].name],
    )


def _ends(longer: Iterable[LayerStats], shorter: Iterable[LayerStats]) -> Pairs:
    """Pairs where the longer name ends in a dot and the shorter one."""
    named = {layer.name: layer for layer in shorter if layer.name}
    pairs = []
    for layer in longer:
        rest = layer.name
        while rest:
            rest = rest.partition(".")[2]
            if rest in named and named[rest].num_features == layer.num_features:
                pairs.append((layer, named[rest]))
    return pairs


def _examples(layers: Sequence[LayerStats]) -> str:
    shown = ", ".join(f"{layer.name} with {layer.num_features}" for layer in layers[:3])
    return f"{len(layers)}: {shown}" + (", ..." if len(layers) > 3 else "")
