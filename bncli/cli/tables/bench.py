"""The output of `bncli bench`."""

from bncli.bench import EvaluationBench, Ratio, TrainingStepBench
from bncli.cli.tables.table import (
    console_for_results,
    machine_line,
    print_wrapped,
    runtime_line,
    show_lines,
    table_of,
)
from bncli.wording import plural


def show_training_step_bench(result: TrainingStepBench) -> None:
    """Both rates, their ratio, and the share of the machine's matrix-product peak."""
    lines = {
        "machine": machine_line(result.machine),
        "bncli": f"{result.images_per_second:,.0f} images/s ({runtime_line(result.runtime)})",
        "plain loop": f"{result.plain_images_per_second:,.0f} images/s (float32, contiguous, DataLoader"
        f" with {plural(result.plain_workers, 'worker')}, torchvision transforms)",
        "ratio": f"{result.ratio_to_plain:.2f}, from {result.ratio_min:.2f} to {result.ratio_max:.2f}"
        f" (median of {plural(result.num_rounds, 'round')} of {plural(result.steps_per_round, 'step')} in"
        f" turns, batches of {result.batch_size:,})",
        "of the peak": f"{result.share_of_peak:.0%} ({result.gflops_per_second:,.0f} of"
        f" {result.peak_gflops_per_second:,.0f} GFLOP/s, the best 2048x2048 matrix product)",
    }
    show_lines(console_for_results(), lines)


def show_evaluation_bench(result: EvaluationBench) -> None:
    """What each path does, then batches, then single images."""
    console = console_for_results()
    lines = {"machine": machine_line(result.machine), "runtime": runtime_line(result.runtime)}
    show_lines(console, lines | {path.name: path.how for path in result.paths})
    console.print()
    table = table_of(None, f"batches of {result.batch_size}", "images/s", "ratio", "from", "to", "changed")
    for path in result.paths:
        rate = "-" if path.images_per_second is None else f"{path.images_per_second:,.0f}"
        changed = "-" if path.prediction_flips is None else f"{path.prediction_flips:.2%}"
        table.add_row(path.name, rate, *_cells(path.throughput_ratio), changed)
    console.print(table)
    console.print()
    table = table_of(None, "single images", "median ms", "p99 ms", "ratio", "from", "to", "to ONNX")
    for path in result.paths:
        times = [
            f"{ms:.2f}" if ms is not None else "-" for ms in (path.latency_median_ms, path.latency_p99_ms)
        ]
        table.add_row(path.name, *times, *_cells(path.latency_ratio), _cells(path.latency_ratio_to_onnx)[0])
    console.print(table)
    console.print()
    rounds = plural(result.num_rounds, "round")
    batches = plural(result.batches_per_round, "batch", "batches")
    meanings = {
        "measured": f"medians of {rounds} of {batches} and {plural(result.calls_per_round, 'single image')},"
        " all paths in turns",
        "ratio": "against plain PyTorch in the same round; of images/s above 1 is faster, of ms below 1",
        "changed": f"share of {plural(result.num_test_images, 'test image')} with another class than in"
        " plain PyTorch",
    }
    show_lines(console, meanings)
    console.print()
    print_wrapped(console, result.verdict, style="bold")


def _cells(ratio: Ratio | None) -> tuple[str, str, str]:
    if ratio is None:
        return ("-", "-", "-")
    return (f"{ratio.median:.2f}", f"{ratio.min:.2f}", f"{ratio.max:.2f}")
