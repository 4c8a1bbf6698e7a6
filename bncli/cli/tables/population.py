"""The output of `bncli bench population`."""

from bncli.bench import PopulationBench
from bncli.cli.tables.table import console_for_results, machine_line, number, show_lines, table_of


def show_population_bench(result: PopulationBench) -> None:
    """Errors of each tool on the hard data, then what a pass of each costs."""
    console = console_for_results()
    show_lines(
        console,
        {
            "machine": machine_line(result.machine),
            "data": f"mean {result.data_mean:g}, deviation {result.data_deviation:g}, float32",
        },
    )
    console.print()
    tools = list(result.errors[0].mean)
    table = table_of("Largest relative error, against float64", "batches", "of", *tools, left=2)
    for one in result.errors:
        table.add_row(one.cut, "mean", *(number(one.mean[tool]) for tool in tools))
        table.add_row("", "variance", *(number(one.var[tool]) for tool in tools))
    console.print(table)
    console.print()
    table = table_of("One measurement, in turns", "tool", "seconds", "ratio", "from", "to")
    for time in result.times:
        ratios = (f"{value:.3f}" for value in (time.ratio, time.ratio_min, time.ratio_max))
        table.add_row(time.tool, f"{time.seconds:.3f}", *ratios)
    console.print(table)
    console.print()
    share = result.exact_forward_passes / result.num_layers
    show_lines(
        console,
        {
            "network": f"{result.network}, {result.num_layers} BatchNorm layers",
            "images": f"{result.num_images:,} of {result.image_size}x{result.image_size},"
            f" in batches of {result.batch_size}; {result.threads} threads",
            "ratio": f"to the plain forward pass, in eval mode; median of n = {result.num_rounds} rounds",
            "exact": f"{result.exact_forward_passes:.2f} forward passes in FLOPs, {share:.2f} a layer",
        },
    )
