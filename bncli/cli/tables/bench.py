"""The output of `bncli bench`."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from bncli.bench import ConvolutionSpeed, EvaluationBench, Ratio, TrainingStepBench
from bncli.cli.messages import one_line
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
    console = console_for_results()
    show_lines(console, lines)
    if result.convolutions is not None:
        console.print()
        _show_convolutions(console, result.convolutions)


def _show_convolutions(console: Console, convolutions: Sequence[ConvolutionSpeed]) -> None:
    """Each convolution's products, and what the columns mean."""
    table = table_of(None, "convolution", "product", "GFLOP/s", "of peak", "matrix", "of step", left=2)
    for layer in convolutions:
        size = f"{layer.in_channels}-{layer.out_channels}, {layer.output_size[0]}x{layer.output_size[1]}"
        names = [one_line(layer.name), size, *[""] * len(layer.products)]
        for name, product in zip(names, layer.products, strict=False):
            table.add_row(
                name,
                product.product,
                f"{product.gflops_per_second:,.0f}",
                f"{product.share_of_peak:.0%}",
                f"{product.matrix_gflops_per_second:,.0f}",
                "-" if product.share_of_step is None else f"{product.share_of_step:.1%}",
            )
    console.print(table)
    console.print()
    num_images = max((layer.num_images for layer in convolutions), default=0)
    meanings = {
        "convolution": "name; channels in and out, and pixels of the output",
        "product": "forward, or the gradient by the input or the weight; patches: bncli's own way",
        "GFLOP/s": f"the best of several times, {plural(num_images, 'image')} at once",
        "of peak": "share of the best 2048x2048 matrix product",
        "matrix": "GFLOP/s of a matrix product of the same sizes",
        "of step": "share of a training step's time; -: the step does not compute it",
    }
    show_lines(console, meanings)


def show_evaluation_bench(result: EvaluationBench) -> None:
    """What each way does, then batches, then single images, then processes of its own."""
    console = console_for_results()
    lines = {"machine": machine_line(result.machine), "runtime": runtime_line(result.runtime)}
    show_lines(console, lines | {path.name: path.how for path in result.paths})
    for table in _tables(result):
        console.print()
        console.print(table)
    console.print()
    first = result.paths[0].name
    rounds = plural(result.num_rounds, "round")
    batches = plural(result.batches_per_round, "batch", "batches")
    meanings = {
        "measured": f"medians of {rounds} of {batches} and {plural(result.calls_per_round, 'single image')},"
        " all in turns; every way gets uint8 images and normalises them itself",
        "ratio": f"against {first} in the same round; of images/s above 1 is faster, of times below 1",
        "changed": f"share of {plural(result.num_test_images, 'test image')} with another class than"
        f" by {first}",
    }
    if result.num_starts:
        meanings["first answer"] = (
            f"from the start of a process to the class of one image, then the peak of memory in batches;"
            f" {plural(result.num_starts, 'process', 'processes')} each"
        )
    show_lines(console, meanings)
    console.print()
    print_wrapped(console, result.verdict, style="bold")


def _tables(result: EvaluationBench) -> Iterator[Table]:
    title = f"batches of {result.batch_size}"
    table = table_of(None, title, "images/s", "ratio", "from", "to", "to ONNX", "changed")
    for path in result.paths:
        rate = "-" if path.images_per_second is None else f"{path.images_per_second:,.0f}"
        changed = "-" if path.prediction_flips is None else f"{path.prediction_flips:.2%}"
        to_onnx = _cells(path.throughput_ratio_to_onnx)[0]
        table.add_row(path.name, rate, *_cells(path.throughput_ratio), to_onnx, changed)
    yield table
    table = table_of(None, "single images", "median ms", "p99 ms", "ratio", "from", "to", "to ONNX")
    for path in result.paths:
        times = [
            f"{ms:.2f}" if ms is not None else "-" for ms in (path.latency_median_ms, path.latency_p99_ms)
        ]
        table.add_row(path.name, *times, *_cells(path.latency_ratio), _cells(path.latency_ratio_to_onnx)[0])
    yield table
    if result.num_starts:
        table = table_of(None, "first answer", "seconds", "ratio", "from", "to", "peak MiB")
        for path in result.paths:
            seconds = "-" if path.first_answer_seconds is None else f"{path.first_answer_seconds:.2f}"
            peak = "-" if path.peak_mib is None else f"{path.peak_mib:,.0f}"
            table.add_row(path.name, seconds, *_cells(path.first_answer_ratio), peak)
        yield table


def _cells(ratio: Ratio | None) -> tuple[str, str, str]:
    if ratio is None:
        return ("-", "-", "-")
    return (f"{ratio.median:.2f}", f"{ratio.min:.2f}", f"{ratio.max:.2f}")
