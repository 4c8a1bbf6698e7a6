"""`bncli bench`: what this machine is good for, and which way of computing is fastest for a network."""

from pathlib import Path
from typing import Annotated

import typer

from bncli.builtin_configs import DEFAULT_NAME
from bncli.cli.messages import print_note
from bncli.cli.opened_checkpoint import load_subject_data, open_config, open_subject
from bncli.cli.options import (
    CheckpointArgument,
    ConfigArgument,
    DataRootOption,
    DeviceOption,
    JsonOption,
    SetOption,
)
from bncli.cli.overrides import effective_overrides

bench_app = typer.Typer(help="Time training and evaluation on this machine, beside other ways of computing.")


@bench_app.callback()
def bench() -> None:
    """Time training and evaluation on this machine, beside other ways of computing in the same run."""


@bench_app.command("train")
def bench_train(
    config: ConfigArgument = Path(DEFAULT_NAME),
    overrides: SetOption = None,
    device: DeviceOption = None,
    data_root: DataRootOption = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of each loop, in turns.")] = 5,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Training steps in a round.")] = 4,
    workers: Annotated[int, typer.Option(min=0, max=64, help="Of the plain loop's DataLoader.")] = 0,
    as_json: JsonOption = False,
) -> int:
    """Time the training step against the same network in a plain PyTorch loop."""
    from bncli.bench import bench_training_step
    from bncli.cli.progress import ProgressReporter
    from bncli.cli.tables.bench import show_training_step_bench
    from bncli.cli.tables.table import print_json

    overrides = effective_overrides("bench train", overrides, device=device, data_root=data_root)
    with ProgressReporter() as progress:
        result = bench_training_step(
            open_config(config, overrides),
            num_rounds=rounds,
            steps_per_round=steps,
            plain_workers=workers,
            data_progress=progress,
            report=progress.note,
        )
    print_json(result) if as_json else show_training_step_bench(result)
    return 0


@bench_app.command("eval")
def bench_eval(
    checkpoint: CheckpointArgument,
    overrides: SetOption = None,
    device: DeviceOption = None,
    data_root: DataRootOption = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of all paths, in turns.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, max=100_000, help="Images in a batch.")] = 256,
    batches: Annotated[int, typer.Option(min=1, max=1000, help="Batches in a round.")] = 2,
    calls: Annotated[int, typer.Option(min=1, max=10_000, help="Single images in a round.")] = 100,
    as_json: JsonOption = False,
) -> int:
    """Compare evaluation with plain PyTorch and ONNX Runtime: throughput, latency, changed predictions."""
    from bncli.bench import bench_evaluation
    from bncli.cli.tables.bench import show_evaluation_bench
    from bncli.cli.tables.table import print_json

    overrides = effective_overrides("bench eval", overrides, device=device, data_root=data_root)
    subject = open_subject(checkpoint, overrides, command="bench eval")
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
    print_json(result) if as_json else show_evaluation_bench(result)
    return 0
