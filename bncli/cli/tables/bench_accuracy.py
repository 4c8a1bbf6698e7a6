"""The output of `bncli bench accuracy`."""

from bncli.bench import AccuracyBench
from bncli.cli.tables.table import console_for_results, machine_line, runtime_line, show_lines, table_of


def show_accuracy_bench(result: AccuracyBench) -> None:
    """Seconds to each accuracy, then what they were measured on."""
    console = console_for_results()
    num_seeds = len(result.seeds)
    table = table_of(None, "accuracy", "reached", "seconds")
    for target in result.targets:
        seconds = _plus_minus(target.seconds_mean, target.seconds_std, "{:.1f}")
        table.add_row(f"{target.accuracy:.2%}", f"{target.num_reached} of {num_seeds}", seconds)
    console.print(table)
    console.print()
    lines = {
        "seconds": "from the start of the process to the evaluation that first reached it",
        "final accuracy": _plus_minus(result.final.mean, result.final.std, "{:.2%}"),
        "seeds": f"n = {num_seeds}; mean ± standard deviation where all of them reached it",
        "peak memory": f"{max(run.peak_mib for run in result.seeds):,.0f} MiB, the largest of the runs",
        "machine": machine_line(result.machine),
        "runtime": f"{runtime_line(result.runtime)}; {result.peak_gflops_per_second:,.0f} GFLOP/s, the best"
        " 2048x2048 matrix product",
        "commit": result.commit or "not in a checkout",
        "each run": result.command,
    }
    if result.tta is not None:
        accuracy, cost = result.tta.accuracy, result.tta.seconds
        lines[f"--tta {result.tta.views}"] = (
            f"{_plus_minus(accuracy.mean, accuracy.std, '{:.2%}')} in"
            f" {_plus_minus(cost.mean, cost.std, '{:.1f}')} s more, in no number above"
        )
    show_lines(console, lines)


def _plus_minus(mean: float | None, std: float | None, form: str) -> str:
    if mean is None:
        return "-"
    return form.format(mean) if std is None else f"{form.format(mean)} ± {form.format(std)}"
