"""`bncli bench`: measurements that back the README's numbers."""

from pathlib import Path
from typing import Annotated

import typer

from bncli.cli.commands.bench_accuracy import bench_time_to_accuracy
from bncli.cli.commands.bench_eval import bench_evaluation_paths
from bncli.cli.commands.bench_scale import bench_scale_of_training
from bncli.cli.messages import print_note
from bncli.cli.options import CheckpointArgument, ConfigArgument, JsonOption, SetOption, make_empty_dir

bench_app = typer.Typer(help="Measure what the README claims, beside rivals in the same run.")


@bench_app.callback()
def bench() -> None:
    """Measure what the README claims, beside rivals in the same run."""


@bench_app.command("train")
def bench_train(
    config: ConfigArgument,
    overrides: SetOption = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of each loop, in turns.")] = 5,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Training steps in a round.")] = 4,
    workers: Annotated[int, typer.Option(min=0, max=64, help="Of the plain loop's DataLoader.")] = 0,
    as_json: JsonOption = False,
) -> int:
    """Time the training step against the same network in a plain PyTorch loop."""
    from bncli.bench import bench_training_step
    from bncli.cli.progress import DataReporter
    from bncli.cli.subject import open_config
    from bncli.cli.tables.table import print_json
    from bncli.cli.tables.training import show_training_step_bench

    result = bench_training_step(
        open_config(config, overrides),
        num_rounds=rounds,
        steps_per_round=steps,
        plain_workers=workers,
        data_progress=DataReporter(),
        report=print_note,
    )
    print_json(result) if as_json else show_training_step_bench(result)
    return 0


@bench_app.command("population")
def bench_population_statistics(
    network: Annotated[str, typer.Option(metavar="NAME", help="A classifier of torchvision's.")] = "resnet18",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of all tools, in turns.")] = 5,
    images: Annotated[int, typer.Option(min=2, max=100_000, help="Images in a pass.")] = 64,
    batch_size: Annotated[int, typer.Option(min=2, max=10_000, help="Images in a batch.")] = 32,
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="Height and width in pixels.")] = 224,
    as_json: JsonOption = False,
) -> int:
    """Compare population statistics with fvcore's and update_bn's: how right, and how fast."""
    from bncli.bench import bench_population
    from bncli.cli.tables.population import show_population_bench
    from bncli.cli.tables.table import print_json

    result = bench_population(
        network=network,
        num_rounds=rounds,
        num_images=images,
        batch_size=batch_size,
        image_size=image_size,
        report=print_note,
    )
    print_json(result) if as_json else show_population_bench(result)
    return 0


@bench_app.command("repair")
def bench_repair_statistics(
    checkpoint: CheckpointArgument,
    overrides: SetOption = None,
    num_images: Annotated[
        int, typer.Option(min=2, help="Training images that population statistics are measured on.")
    ] = 5_000,
    save_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save the ruined checkpoints in this new directory.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Ruin a trained network's running statistics in four ways; diagnose and repair each."""
    from bncli.bench import bench_repair
    from bncli.cli.phase_progress import PhaseReporter
    from bncli.cli.subject import load_subject_data, open_subject
    from bncli.cli.tables.demo import describe_repair_bench, show_repair_bench
    from bncli.cli.tables.table import print_json

    subject = open_subject(checkpoint, overrides, batch_invariant=False)
    if save_dir is not None:
        make_empty_dir(save_dir)
    dataset = load_subject_data(subject)
    with PhaseReporter() as progress:
        result = bench_repair(
            checkpoint,
            subject.checkpoint,
            subject.config,
            dataset,
            subject.runtime,
            num_images=num_images,
            save_dir=save_dir,
            report=progress.note,
            progress=progress,
        )
    print_json(describe_repair_bench(result)) if as_json else show_repair_bench(result)
    return 0


@bench_app.command("inspect")
def bench_inspect(
    gib: Annotated[float, typer.Option(min=0.001, max=1000, help="Size of the large files, in GiB.")] = 8.0,
    layers: Annotated[int, typer.Option(min=1, max=10_000, help="BatchNorm layers in them.")] = 200,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the files are written, and removed again.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Time inspect-stats on large files, and on one of 10,000 layers; with its peak of memory."""
    from bncli.bench import bench_inspection
    from bncli.cli.tables.table import print_json
    from bncli.cli.tables.training import show_inspection_bench

    result = bench_inspection(gib=gib, num_layers=layers, directory=directory, report=print_note)
    print_json(result) if as_json else show_inspection_bench(result)
    return 0


bench_app.command("eval")(bench_evaluation_paths)
bench_app.command("scale")(bench_scale_of_training)
bench_app.command("accuracy")(bench_time_to_accuracy)
