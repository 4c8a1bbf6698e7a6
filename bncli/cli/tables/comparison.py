"""The output of `bncli inspect-stats FIRST SECOND`."""

import textwrap
from typing import Any

from rich.console import Console

from bncli.batchnorm import Comparison, DivergenceSummary, LayerComparison
from bncli.cli.messages import one_line
from bncli.cli.tables.table import console_for_results, number, show_lines, table_of

ADVICE = {
    "statistics_moved_weights_unchanged": (
        "Their inputs have the same distribution as before, so only the estimate changed: recalibrated on"
        " purpose, or updated by a model that was in train mode while it only should have computed. If"
        " you did not mean it, restore the first checkpoint's buffers."
    ),
    "weights_moved_statistics_unchanged": (
        "Frozen BatchNorm keeps its statistics on purpose. Averaged, pruned, merged or quantised weights"
        " must not: their statistics are those of another network, and have to be measured again."
    ),
}
MARKS = {
    "S": "running_mean or running_var moved",
    "W": "the layer's own weight or bias moved",
    "F": "the weights that feed it moved, those after the BatchNorm before",
}
WIDTH = 80


def describe_comparison(first: str, second: str, comparison: Comparison, *, channels: bool) -> dict[str, Any]:
    """The JSON document; without channels, one row of numbers for each layer."""
    return {
        "first": first,
        "second": second,
        "identical": comparison.identical,
        "matched_by": comparison.matched_by,
        "order_known": comparison.order_known,
        "num_layers": len(comparison.layers),
        "layers": [
            describe_layer_comparison(layer) | (_describe_channels(layer) if channels else {})
            for layer in comparison.layers
        ],
        "only_in_first": comparison.only_in_first,
        "only_in_second": comparison.only_in_second,
        "different_num_features": comparison.different_num_features,
        "num_tensors": comparison.num_tensors,
        "num_tensors_changed": comparison.num_tensors_changed,
        "num_tensors_only_in_first": comparison.num_tensors_only_in_first,
        "num_tensors_only_in_second": comparison.num_tensors_only_in_second,
    }


def describe_layer_comparison(layer: LayerComparison) -> dict[str, Any]:
    """A layer's entry in the JSON document, and its row in the CSV file."""
    summary = layer.summary or DivergenceSummary(num_incomparable=0)
    return {
        "name": layer.name,
        "name_in_second": layer.name_in_second,
        "mean_shift": summary.mean_shift,
        "max_mean_shift": summary.max_mean_shift,
        "max_mean_shift_channel": summary.max_mean_shift_channel,
        "var_ratio": summary.var_ratio,
        "var_ratio_min": summary.var_ratio_min,
        "var_ratio_max": summary.var_ratio_max,
        "kl": summary.kl,
        "kl_sum": summary.kl_sum,
        "max_kl": summary.max_kl,
        "max_kl_channel": summary.max_kl_channel,
        "num_incomparable_channels": summary.num_incomparable,
        "num_batches_tracked_first": layer.num_batches_tracked[0],
        "num_batches_tracked_second": layer.num_batches_tracked[1],
        "statistics_moved": layer.statistics_moved,
        "weights_moved": layer.weights_moved,
        "feeding_weights_moved": layer.feeding_weights_moved,
        "hyperparameters_changed": layer.hyperparameters_changed,
        "flags": layer.flags,
    }


def _describe_channels(layer: LayerComparison) -> dict[str, Any]:
    return {"channels": layer.divergence}


def show_comparison(first: str, second: str, comparison: Comparison) -> None:
    """One row per layer in the order of the network, then what does not match, the flags and the sum."""
    console = console_for_results()
    console.print(f"first   {one_line(first)}\nsecond  {one_line(second)}", style="bold")
    layers = list(comparison.layers)
    if layers:
        console.print()
        _show_layers(console, layers)
        console.print()
        _show_legend(console)
    _show_mismatches(console, comparison)
    for flag, advice in ADVICE.items():
        _show_flag(console, flag, advice, [layer for layer in layers if flag in layer.flags])
    console.print()
    _print_wrapped(console, _verdict(comparison), style="bold")


def _show_layers(console: Console, layers: list[LayerComparison]) -> None:
    table = table_of(
        None,
        "layer",
        "mean shift\nrms  max",
        "variance ratio\nmin  mean  max",
        "KL, nats\nmean  max",
        "moved",
    )
    for column in table.columns[1:]:
        column.no_wrap = True
    summaries = [layer.summary or DivergenceSummary(num_incomparable=0) for layer in layers]
    cells = [
        _aligned([[number(x.mean_shift), number(x.max_mean_shift)] for x in summaries]),
        _aligned([[*map(number, (x.var_ratio_min, x.var_ratio, x.var_ratio_max))] for x in summaries]),
        _aligned([[number(x.kl), number(x.max_kl)] for x in summaries]),
    ]
    for layer, *row in zip(layers, *cells, strict=True):
        style = "bold red" if layer.flags else None
        table.add_row(one_line(layer.name), *row, _marks(layer), style=style)
    table.columns[-1].justify = "left"
    console.print(table)


def _aligned(rows: list[list[str]]) -> list[str]:
    """Several numbers in one column, aligned among themselves: narrower than several columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]


def _marks(layer: LayerComparison) -> str:
    fed = "?" if layer.feeding_weights_moved is None else "F" if layer.feeding_weights_moved else "-"
    return f"{'S' if layer.statistics_moved else '-'} {'W' if layer.weights_moved else '-'} {fed}"


def _show_legend(console: Console) -> None:
    meanings = {
        "mean shift": "second minus first, in the first's standard deviations",
        "variance": "running_var + eps, second over first; the mean is geometric",
        "KL": "divergence of the second's normal from the first's, per channel",
    }
    show_lines(console, {**meanings, **MARKS})


def _show_mismatches(console: Console, comparison: Comparison) -> None:
    if comparison.matched_by == "order":
        console.print()
        _print_wrapped(console, "No layer name agrees: layers were matched by their order and channels.")
    if not comparison.order_known:
        console.print()
        text = "Both files have their names sorted, so that the order of the layers is lost: which weights"
        _print_wrapped(console, f"{text} feed a layer is unknown (?).")
    groups = {
        "Only in the first": comparison.only_in_first,
        "Only in the second": comparison.only_in_second,
        "Other number of channels": comparison.different_num_features,
    }
    for title, names in groups.items():
        if names:
            console.print()
            _print_wrapped(console, f"{title}: {_names(names)}", style="bold red")
    if left_out := [layer for layer in comparison.layers if layer.summary and layer.summary.num_incomparable]:
        console.print()
        channels = sum(layer.summary.num_incomparable for layer in left_out if layer.summary)
        text = f"Left out, being no usable numbers in one or both: {channels} channels of"
        _print_wrapped(console, f"{text} {_names([layer.name for layer in left_out])}", style="bold red")


def _show_flag(console: Console, flag: str, advice: str, layers: list[LayerComparison]) -> None:
    if layers:
        console.print()
        names = _names([layer.name for layer in layers])
        _print_wrapped(console, f"{flag}: {len(layers)} of the layers ({names})", style="bold red")
        _print_wrapped(console, advice)


def _names(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(map(one_line, names[:8])) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")


def _print_wrapped(console: Console, text: str, style: str | None = None) -> None:
    console.print(textwrap.fill(text, WIDTH, break_on_hyphens=False), style=style)


def _verdict(comparison: Comparison) -> str:
    if comparison.identical:
        return f"Identical: all {comparison.num_tensors:,} tensors agree in every bit."
    parts = [f"{comparison.num_tensors_changed:,} of {comparison.num_tensors:,} tensors differ"]
    lone = {"first": comparison.num_tensors_only_in_first, "second": comparison.num_tensors_only_in_second}
    parts += [f"{count:,} are only in the {which}" for which, count in lone.items() if count]
    if changed := [layer.name for layer in comparison.layers if layer.hyperparameters_changed]:
        parts.append(f"momentum or eps differ in {_names(changed)}")
    moved = [layer for layer in comparison.layers if layer.summary and layer.summary.kl]
    moved.sort(key=lambda layer: -(layer.summary.kl or 0.0) if layer.summary else 0.0)
    most = ", ".join(one_line(layer.name) for layer in moved[:3])
    return f"{'; '.join(parts)}." + (f" Farthest moved, by KL: {most}." if most else "")


def show_channels_compared(comparison: Comparison) -> None:
    """One table per layer with one row per channel."""
    console = console_for_results()
    for layer in comparison.layers:
        if layer.divergence is None:
            continue
        table = table_of(one_line(layer.name), "channel", "mean_shift", "var_ratio", "kl", left=0)
        found = layer.divergence
        columns = (found.mean_shift.tolist(), found.var_ratio.tolist(), found.kl.tolist())
        for channel, values in enumerate(zip(*columns, strict=True)):
            table.add_row(str(channel), *(f"{value:.4g}" for value in values))
        console.print(table)
