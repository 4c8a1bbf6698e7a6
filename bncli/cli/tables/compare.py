"""The output of `bncli compare`."""

from collections.abc import Iterator, Sequence

from rich.console import Console

from bncli.batchnorm import Comparison, DivergenceSummary, LayerComparison
from bncli.batchnorm.comparison import STATISTICS_ALONE
from bncli.cli.tables.csv_rows import Row
from bncli.cli.tables.layer_table import show_layer_table
from bncli.cli.tables.table import aligned, console_for_results, number, print_wrapped, show_lines, table_of
from bncli.wording import list_names, plural

MARKS = {
    "S": "running_mean or running_var changed",
    "W": "weight or bias of this layer changed",
    "F": "weights between the BatchNorm before and this one changed",
    "?": "unknown: no such weights are known, or one file lacks them",
}


def comparison_rows(comparison: Comparison, *, channels: bool) -> Iterator[Row]:
    """The rows of the CSV file: one per layer that both have, or per channel of these."""
    for layer in comparison.layers:
        if channels and layer.divergence is not None:
            columns = {name: values.tolist() for name, values in vars(layer.divergence).items()}
            for channel, numbers in enumerate(zip(*columns.values(), strict=True)):
                yield {"layer": layer.name, "channel": channel, **dict(zip(columns, numbers, strict=True))}
        if not channels:
            entry = layer.to_dict()
            yield {"layer": entry.pop("name"), **entry}


def show_comparison(first: str, second: str, comparison: Comparison) -> None:
    """One row per layer in the order of the network, then what does not match, the flags and the sum."""
    console = console_for_results()
    print_wrapped(console, first, mark="first   ", style="bold")
    print_wrapped(console, second, mark="second  ", style="bold")
    layers = list(comparison.layers)
    if layers:
        console.print()
        shows_changes = not comparison.only_batch_norm and not comparison.identical
        _show_layers(console, layers, shows_changes=shows_changes)
        console.print()
        _show_legend(console, layers, shows_changes=shows_changes)
    _show_mismatches(console, comparison)
    _show_flags(console, comparison)
    for sentence in comparison.conversion:
        console.print()
        print_wrapped(console, sentence)
    console.print()
    print_wrapped(console, comparison.verdict, style="bold")


def _show_layers(console: Console, layers: list[LayerComparison], *, shows_changes: bool) -> None:
    summaries = [layer.summary or DivergenceSummary(num_incomparable=0) for layer in layers]
    columns = {
        "mean shift\nrms  max": aligned(
            [
                [number(x.mean_shift_in_first_deviations), number(x.max_mean_shift_in_first_deviations)]
                for x in summaries
            ],
            gap=2,
        ),
        "variance ratio\nmin  mean  max": aligned(
            [[*map(number, (x.var_ratio_min, x.var_ratio, x.var_ratio_max))] for x in summaries], gap=2
        ),
        "KL divergence\nmean  max": aligned([[number(x.kl), number(x.max_kl)] for x in summaries], gap=2),
    }
    if shows_changes:
        columns["changed"] = [_marks(layer) for layer in layers]
    styles = ["bold red" if layer.flags else None for layer in layers]
    show_layer_table(console, [layer.name for layer in layers], columns, styles)


def _marks(layer: LayerComparison) -> str:
    fed = "?" if layer.feeding_weights_moved is None else "F" if layer.feeding_weights_moved else "-"
    return f"{'S' if layer.statistics_moved else '-'} {'W' if layer.weights_moved else '-'} {fed}"


def _show_legend(console: Console, layers: Sequence[LayerComparison], *, shows_changes: bool) -> None:
    used = "SWF" + "".join(map(_marks, layers)) if shows_changes else ""
    meanings = {
        "mean shift": "move of running_mean, in standard deviations of the first file",
        "variance ratio": "running_var + eps of the second file, divided by the first's",
        "KL divergence": "distance of the two normal distributions; 0 is equal",
    }
    show_lines(console, {**meanings, **{mark: text for mark, text in MARKS.items() if mark in used}})


def _show_mismatches(console: Console, comparison: Comparison) -> None:
    if comparison.matched_by == "order":
        console.print()
        text = "The files name their layers differently: they were matched by order and number of channels."
        print_wrapped(console, text)
    if comparison.matched_by == "values":
        console.print()
        text = "The files name their layers differently: they were matched by their values."
        print_wrapped(console, text)
    if comparison.only_batch_norm:
        _show_groups(console, comparison)
        return
    if not comparison.order_known and not comparison.identical:
        console.print()
        text = (
            "Both files sort their tensors by name. So the order of the layers is unknown, and also whether"
        )
        print_wrapped(console, f"{text} the weights before a layer changed (?).")
    _show_groups(console, comparison)


def _show_groups(console: Console, comparison: Comparison) -> None:
    groups = {
        "Only in the first": comparison.only_in_first,
        "Only in the second": comparison.only_in_second,
        "Not compared, as the numbers of channels differ": comparison.different_num_features,
    }
    for title, names in groups.items():
        if names:
            console.print()
            print_wrapped(console, f"{title}: {list_names(names)}", style="bold red")
    if left_out := [layer for layer in comparison.layers if layer.summary and layer.summary.num_incomparable]:
        console.print()
        channels = sum(layer.summary.num_incomparable for layer in left_out if layer.summary)
        text = f"Left out: {plural(channels, 'channel')} with NaN, infinity or a negative variance, in"
        print_wrapped(console, f"{text} {list_names([layer.name for layer in left_out])}", style="bold red")


def _show_flags(console: Console, comparison: Comparison) -> None:
    for flag, meaning in comparison.explanations().items():
        names = comparison.flagged(flag)
        console.print()
        print_wrapped(
            console, f"{flag}: {plural(len(names), 'layer')} ({list_names(names)})", style="bold red"
        )
        alone = comparison.moved_alone
        if flag != STATISTICS_ALONE or alone is None:
            print_wrapped(console, meaning)
            continue
        print_wrapped(console, " ".join(alone.known))
        print_wrapped(console, "Possible causes:")
        for cause in alone.possible_causes:
            print_wrapped(console, cause, mark="- ")


def show_channels_compared(comparison: Comparison) -> None:
    """One table per layer with one row per channel."""
    console = console_for_results()
    for layer in comparison.layers:
        if layer.divergence is None:
            continue
        found = layer.divergence
        headers = "channel", "mean shift, in the\nfirst's deviations", "variance ratio", "KL divergence"
        print_wrapped(console, layer.name, style="bold")
        table = table_of(None, *headers, left=0)
        columns = (
            found.mean_shift_in_first_deviations.tolist(),
            found.var_ratio.tolist(),
            found.kl.tolist(),
        )
        for channel, values in enumerate(zip(*columns, strict=True)):
            table.add_row(str(channel), *(f"{value:.4g}" for value in values))
        console.print(table)
        console.print()
