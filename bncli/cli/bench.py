"""`bncli bench`: measurements that back the README's numbers."""

from pathlib import Path
from typing import Annotated

import typer

from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption, SetOption

bench_app = typer.Typer(help="Measure the speed that the README claims.")


@bench_app.callback()
def bench() -> None:
    """Measure the speed that the README claims."""


@bench_app.command("train")
def bench_train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")],
    overrides: SetOption = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of each loop, in turns.")] = 5,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Training steps in a round.")] = 4,
    workers: Annotated[int, typer.Option(min=0, max=64, help="Of the plain loop's DataLoader.")] = 0,
    as_json: JsonOption = False,
) -> int:
    """Time the training step against the same network in a plain PyTorch loop."""
    from bncli.bench import bench_training_step
    from bncli.cli.progress import DataReporter
    from bncli.cli.render import print_json
    from bncli.cli.render_train import show_training_step_bench
    from bncli.config_file import load_config

    result = bench_training_step(
        load_config(config, overrides),
        num_rounds=rounds,
        steps_per_round=steps,
        plain_workers=workers,
        data_progress=DataReporter(),
        report=print_note,
    )
    print_json(result) if as_json else show_training_step_bench(result)
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
    from bncli.cli.render import print_json
    from bncli.cli.render_train import show_inspection_bench

    result = bench_inspection(gib=gib, num_layers=layers, directory=directory, report=print_note)
    print_json(result) if as_json else show_inspection_bench(result)
    return 0
