"""What was done to layers on the way from one file to another, a sentence each."""

from collections.abc import Sequence

from bncli.batchnorm.comparison import LayerComparison
from bncli.batchnorm.conversion import eps_matters, momentum_is_inverted
from bncli.batchnorm.layers import LayerStats
from bncli.wording import list_names


def describe_conversion(
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
