"""`bncli bench`: what this machine is good for, and which way of computing is fastest for a network."""

from dataclasses import asdict
from functools import partial as partial_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bncli.builtin_configs import DEFAULT_NAME
from bncli.cli.help_page import MEASURED, CommandPage, GroupPage
from bncli.cli.messages import print_note
from bncli.cli.named_network import as_typed, named_network
from bncli.cli.opened_checkpoint import load_subject_data, open_config, open_subject
from bncli.cli.opened_export import find_export, open_exported, refuse
from bncli.cli.options import (
    ConfigArgument,
    DataRootOption,
    DeviceOption,
    JsonOption,
    KeyOption,
    LogitsOption,
    ModelArgOption,
    ModelOption,
    NormalizationOption,
    PartialOption,
    SetOption,
)
from bncli.cli.overrides import effective_overrides

if TYPE_CHECKING:
    from bncli.bench.network_source import NetworkSource
    from bncli.cli.named_network import NamedNetwork
    from bncli.cli.opened_checkpoint import Subject

bench_app = typer.Typer(cls=GroupPage)


@bench_app.callback()
def bench() -> None:
    """Time training and evaluation beside plain PyTorch.

    All ways of computing take turns in the same run, so that a busy machine slows down each of them.

    Examples:
    bncli bench train
    bncli bench eval runs/first/last.pt
    """


@bench_app.command("train", cls=CommandPage)
def bench_train(
    config: ConfigArgument = Path(DEFAULT_NAME),
    overrides: SetOption = None,
    device: DeviceOption = None,
    data_root: DataRootOption = None,
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            max=1000,
            metavar="N",
            help="Time each loop this many times, in turns.",
            rich_help_panel=MEASURED,
        ),
    ] = 5,
    steps: Annotated[
        int,
        typer.Option(
            min=1, max=1000, metavar="N", help="Training steps in a round.", rich_help_panel=MEASURED
        ),
    ] = 4,
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            max=64,
            metavar="N",
            help="Worker processes of the plain loop's DataLoader.",
            rich_help_panel=MEASURED,
        ),
    ] = 0,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Show how fast each convolution is, beside matrix products of the same sizes.",
            rich_help_panel=MEASURED,
        ),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Time the training step beside a plain PyTorch loop.

    The plain loop trains the same network on the same images with torch.utils.data.DataLoader.

    Examples:
    bncli bench train
    bncli bench train quickstart --rounds 3 --workers 2
    bncli bench train quickstart --rounds 1 --layers
    """
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
            with_convolutions=layers,
            data_progress=progress,
            report=progress.note,
        )
    print_json(result) if as_json else show_training_step_bench(result)
    return 0


def _network_source(subject: "Subject", named: "NamedNetwork | None") -> "NetworkSource":
    from bncli.bench.network_source import NetworkSource
    from bncli.models.normalized import input_normalization

    file = as_typed(subject.path)
    if named is None:
        return NetworkSource(file)
    if subject.named is None:  # the name repeats what the file records
        return NetworkSource(file, model=named.name, arguments=named.arguments)
    return NetworkSource(
        file,
        is_own=False,
        model=named.name,
        arguments=named.arguments,
        key=named.key,
        partial=named.partial,
        logits=named.logits,
        normalization=input_normalization(subject.model),
    )


@bench_app.command("eval", cls=CommandPage)
def bench_eval(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A checkpoint such as last.pt, or a file of `bncli export`.",
        ),
    ],
    model: ModelOption = None,
    model_args: ModelArgOption = None,
    key: KeyOption = None,
    partial: PartialOption = None,
    normalization: NormalizationOption = None,
    logits: LogitsOption = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    data_root: DataRootOption = None,
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            max=1000,
            metavar="N",
            help="Time each way of computing this many times, in turns.",
            rich_help_panel=MEASURED,
        ),
    ] = 5,
    batch_size: Annotated[
        int,
        typer.Option(min=1, max=100_000, metavar="N", help="Images in a batch.", rich_help_panel=MEASURED),
    ] = 256,
    batches: Annotated[
        int,
        typer.Option(min=1, max=1000, metavar="N", help="Batches in a round.", rich_help_panel=MEASURED),
    ] = 2,
    calls: Annotated[
        int,
        typer.Option(
            min=1,
            max=10_000,
            metavar="N",
            help="Single images in a round, for the time of one call.",
            rich_help_panel=MEASURED,
        ),
    ] = 100,
    starts: Annotated[
        int,
        typer.Option(
            min=0,
            max=100,
            metavar="N",
            help="Processes of its own for each way, for memory and the time to the first answer.",
            rich_help_panel=MEASURED,
        ),
    ] = 3,
    compiles: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Time torch.compile as well, which first compiles for up to a minute.",
            rich_help_panel=MEASURED,
        ),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Time evaluation beside plain PyTorch and other engines.

    Measures images per second in batches, the time of a single image, how many predictions change, memory,
    and the time from the start of a process to its first answer. The last line says what to use here. ONNX
    Runtime and OpenVINO are left out where they are not installed.

    Examples:
    bncli bench eval runs/first/last.pt
    bncli bench eval runs/first/last.pt --batch-size 32 --starts 1
    """
    from bncli.bench import bench_evaluation
    from bncli.checkpoints import load_model
    from bncli.cli.tables.bench import show_evaluation_bench
    from bncli.cli.tables.table import print_json
    from bncli.indexed import pick

    named, exported = None, find_export(checkpoint)
    if exported is not None:
        given = {"--model": model, "--model-arg": model_args, "--key": key, "--partial": partial}
        given |= {"--normalization": normalization, "--logits": logits}
        refuse(checkpoint, given)
        refuse(checkpoint, {"--device": device}, "it is computed on the CPU")
        overrides = effective_overrides("bench eval of an exported file", overrides, data_root=data_root)
        subject = open_exported(exported, overrides)
    else:
        overrides = effective_overrides("bench eval", overrides, device=device, data_root=data_root)
        named = named_network(model, model_args, key, partial, normalization, logits)
        subject = open_subject(checkpoint, overrides, command="bench eval", named=named)
    dataset = load_subject_data(subject)
    result = bench_evaluation(
        exported or _network_source(subject, named),
        pick(dataset.test, range(len(dataset.test))),
        subject.runtime,
        num_rounds=rounds,
        batch_size=batch_size,
        batches_per_round=batches,
        calls_per_round=calls,
        num_starts=starts,
        compiles=compiles,
        load=None if subject.own is None else partial_of(load_model, subject.own),
        report=print_note,
    )
    document = asdict(result) | {"verdict": result.verdict}
    print_json(document) if as_json else show_evaluation_bench(result)
    return 0
