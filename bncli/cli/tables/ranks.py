"""The output of `bncli compare --ranks`."""

from collections.abc import Iterator, Sequence

from bncli.batchnorm import RankComparison, Summary, summarize
from bncli.cli.tables.csv_rows import Row
from bncli.cli.tables.layer_table import show_layer_table
from bncli.cli.tables.table import aligned, console_for_results, print_wrapped, show_lines, table_of
from bncli.wording import list_names

LEGEND = {
    "mean range": "largest minus smallest running_mean of the ranks, in deviations of the pool",
    "variance ratio": "largest running_var + eps of the ranks, divided by the smallest",
    "lost": "share of the pooled variance that averaging the ranks' variances would lose",
    "pooled": "running_var of all ranks' images together: the mean variance, and the variance"
    " between the ranks' means",
}
MAX_RANKS = 16  # whose files are listed
_COLUMNS = ("running_mean", "running_var", "averaged_var", "mean_range", "var_ratio", "lost_share")


def rank_rows(comparison: RankComparison, *, channels: bool) -> Iterator[Row]:
    """The rows of the CSV file: one per layer, or per channel."""
    for layer in comparison.layers:
        columns = {name: getattr(layer, name) for name in _COLUMNS}
        if channels:
            for channel, values in enumerate(zip(*(one.tolist() for one in columns.values()), strict=True)):
                yield {"layer": layer.name, "channel": channel, **dict(zip(columns, values, strict=True))}
            continue
        summaries = {name: summarize(tensor) for name, tensor in columns.items()}
        yield {
            "layer": layer.name,
            "identical": layer.identical,
            "num_batches_tracked": [count for count in layer.num_batches_tracked if count is not None],
            **{
                f"{name}_{which}": None if summary is None else getattr(summary, which)
                for name, summary in summaries.items()
                for which in ("median", "max")
            },
        }


def show_ranks(sources: Sequence[str], comparison: RankComparison) -> None:
    """One row per layer in the order of the network, then what does not match, and the sum."""
    console = console_for_results()
    for rank, source in enumerate(sources[:MAX_RANKS]):
        print_wrapped(console, source, mark=f"rank {rank}  ", style="bold")
    if len(sources) > MAX_RANKS:
        console.print(f"... ({len(sources):,} in all)")
    console.print()
    layers = comparison.layers
    columns = {
        "mean range\nmedian   max": _two([summarize(layer.mean_range) for layer in layers]),
        "variance ratio\nmedian   max": _two([summarize(layer.var_ratio) for layer in layers], digits=3),
        "lost\nmedian    max": _two([summarize(layer.lost_share) for layer in layers], percent=True),
        "pooled\nmedian   max": _two([summarize(layer.running_var) for layer in layers]),
    }
    show_layer_table(console, [layer.name for layer in layers], columns)
    console.print()
    show_lines(console, LEGEND)
    if comparison.not_in_all:
        console.print()
        text = f"Not in all files, or of other sizes: {list_names(comparison.not_in_all)}"
        print_wrapped(console, text, style="bold red")
    console.print()
    print_wrapped(console, comparison.verdict, style="bold")


def show_channels_of_ranks(comparison: RankComparison) -> None:
    """One table per layer with one row per channel."""
    console = console_for_results()
    for layer in comparison.layers:
        print_wrapped(console, layer.name, style="bold")
        headers = ("channel", "pooled\nmean", "pooled\nvariance", "averaged\nvariance", "mean\nrange",
                   "variance\nratio", "lost")  # fmt: skip
        table = table_of(None, *headers, left=0)
        columns = (getattr(layer, name).tolist() for name in _COLUMNS)
        for channel, values in enumerate(zip(*columns, strict=True)):
            *numbers, lost = values
            table.add_row(str(channel), *(f"{value:.4g}" for value in numbers), f"{lost:.2%}")
        console.print(table)
        console.print()


def _two(summaries: Sequence[Summary | None], *, digits: int = 2, percent: bool = False) -> list[str]:
    def text(value: float) -> str:
        return f"{value:.2%}" if percent else f"{value:.{digits}g}"

    return aligned(
        [["-", "-"] if one is None else [text(one.median), text(one.max)] for one in summaries], gap=2
    )
