"""`bncli bench eval`: evaluation beside plain PyTorch and ONNX Runtime."""

from typing import TYPE_CHECKING, Annotated

import typer

from bncli.cli.messages import print_note
from bncli.cli.options import CheckpointArgument, JsonOption, SetOption
from bncli.cli.subject import load_subject_data, open_subject

if TYPE_CHECKING:
    from bncli.bench.evaluation import EvaluationBench, Ratio


def bench_evaluation_paths(
    checkpoint: CheckpointArgument,
    overrides: SetOption = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of all paths, in turns.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Images in a batch.")] = 256,
    batches: Annotated[int, typer.Option(min=1, max=1000, help="Batches in a round.")] = 2,
    calls: Annotated[int, typer.Option(min=1, max=10_000, help="Single images in a round.")] = 100,
    as_json: JsonOption = False,
) -> int:
    """Compare evaluation with plain PyTorch and ONNX Runtime: throughput, latency, changed predictions."""
    from bncli.bench import bench_evaluation
    from bncli.cli.tables.table import print_json

    subject = open_subject(checkpoint, overrides, batch_invariant=False)
    dataset = load_subject_data(subject)
    result = bench_evaluation(
        subject.checkpoint,
        dataset.test.images,
        subject.runtime,
        num_rounds=rounds,
        batch_size=batch_size,
        batches_per_round=batches,
        calls_per_round=calls,
        report=print_note,
    )
    print_json(result) if as_json else _show(result)
    return 0


def _show(result: "EvaluationBench") -> None:
    from bncli.cli.tables.table import console_for_results, machine_line, runtime_line, show_lines, table_of

    console = console_for_results()
    lines = {"machine": machine_line(result.machine), "runtime": runtime_line(result.runtime)}
    show_lines(console, lines | {path.name: path.how for path in result.paths})
    console.print()
    table = table_of(None, f"batches of {result.batch_size}", "images/s", "ratio", "from", "to", "flips")
    for path in result.paths:
        rate = "-" if path.images_per_second is None else f"{path.images_per_second:,.0f}"
        flips = "-" if path.prediction_flips is None else f"{path.prediction_flips:.2%}"
        table.add_row(path.name, rate, *_cells(path.throughput_ratio), flips)
    console.print(table)
    console.print()
    table = table_of(None, "single images", "median ms", "p99 ms", "ratio", "from", "to", "to ONNX")
    for path in result.paths:
        times = [
            f"{ms:.2f}" if ms is not None else "-" for ms in (path.latency_median_ms, path.latency_p99_ms)
        ]
        table.add_row(path.name, *times, *_cells(path.latency_ratio), _cells(path.latency_ratio_to_onnx)[0])
    console.print(table)
    console.print(
        f"medians of n = {result.num_rounds} rounds in turns of {result.batches_per_round} batches and"
        f" {result.calls_per_round} single images; ratios within a round, to plain PyTorch\n"
        f"flips: of {result.num_test_images:,} test images, those whose class is not that of plain PyTorch"
    )


def _cells(ratio: "Ratio | None") -> tuple[str, str, str]:
    if ratio is None:
        return ("-", "-", "-")
    return (f"{ratio.median:.2f}", f"{ratio.min:.2f}", f"{ratio.max:.2f}")
