"""`bncli eval`: accuracy in eval mode, and on what a prediction depends beside its image."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bncli.cli.chosen_engine import check_engine, with_engine
from bncli.cli.help_page import MEASURED, OUTPUT, SHOWN
from bncli.cli.messages import print_note
from bncli.cli.named_network import named_network
from bncli.cli.one_voice import last_words
from bncli.cli.opened_checkpoint import check_labels, load_subject_data, open_subject
from bncli.cli.opened_export import find_export, open_exported, refuse
from bncli.cli.options import (
    BatchInvariantOption,
    ComputedArgument,
    DataRootOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    KeyOption,
    LogitsOption,
    ModelArgOption,
    ModelOption,
    NormalizationOption,
    PartialOption,
    SetOption,
    check_writable,
    parse_sizes,
)
from bncli.cli.overrides import effective_overrides
from bncli.cli.shared_work import shared_work
from bncli.errors import ConfigError

if TYPE_CHECKING:
    from bncli.cli.opened_checkpoint import Subject
    from bncli.cli.tables.eval import EvalReport
    from bncli.data import Dataset
    from bncli.distributed import Ranks
    from bncli.evaluation.examine import Evaluations
    from bncli.evaluation.views import Views


@dataclass(frozen=True)
class _Asked:
    """What is measured on all images beside the accuracy."""

    sweep: tuple[int, ...]  # batch sizes
    num_calibration_images: int | None  # of the gap; None: it is not asked for
    views: "Views | None"


def evaluate_checkpoint(
    checkpoint: ComputedArgument,
    model: ModelOption = None,
    model_args: ModelArgOption = None,
    key: KeyOption = None,
    partial: PartialOption = None,
    normalization: NormalizationOption = None,
    logits: LogitsOption = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    engine: EngineOption = None,
    data_root: DataRootOption = None,
    num_images: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Compare the predictions of this many test images, each alone and in batches.",
            rich_help_panel=MEASURED,
        ),
    ] = 256,
    batch_sizes: Annotated[
        str,
        typer.Option(
            metavar="N,N,...", help="The sizes of the batches that are compared.", rich_help_panel=MEASURED
        ),
    ] = "2,3,7,16,64,256",
    batch_invariant: BatchInvariantOption = False,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Save what was compared, with SHA-256 digests of all outputs, as a JSON file.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Measure the accuracy in batches of these sizes, in train mode and in eval mode.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    gap: Annotated[
        bool,
        typer.Option(
            "--gap",
            help="Explain the gap between train mode and eval mode: how much of it is due to BatchNorm, and"
            " to which layer?",
            rich_help_panel=MEASURED,
        ),
    ] = False,
    num_calibration_images: Annotated[
        int,
        typer.Option(
            min=2,
            metavar="N",
            help="--gap measures population statistics on this many training images.",
            rich_help_panel=MEASURED,
        ),
    ] = 10_000,
    tta: Annotated[
        Literal["flip", "shifts"] | None,
        typer.Option(
            "--tta",
            metavar="VIEWS",
            help="Test-time augmentation: also report the accuracy when outputs are averaged over views of"
            " each image; flip: the image and its mirror image; shifts: both, also shifted by one pixel."
            " Goes without --batch-invariant, --sweep and --gap.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the result of --sweep or --gap to a .png or .svg file.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    details: Annotated[
        bool,
        typer.Option(
            "--details",
            help="Also show each class, each batch size, the SHA-256 of the outputs, and the hardware.",
            rich_help_panel=SHOWN,
        ),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Measure accuracy, and what a prediction depends on.

    Test images are computed alone and in batches, in eval mode and in train mode: does a prediction depend
    on the other images of its batch? Exit code 1 if one does in eval mode; with --batch-invariant, if a
    single bit does.

    Examples:
    bncli eval runs/first/last.pt
    bncli eval runs/first/last.pt --gap
    bncli eval runs/first/last.pt --sweep 1,2,4,8,16,32,64 --plot sweep.png
    bncli eval a.pt --model net.py:Net --data-root pics --set data.image_size=32
    """
    from bncli.cli.tables.eval import show_eval
    from bncli.cli.tables.table import print_json
    from bncli.indexed import pick

    sizes = parse_sizes(batch_sizes, "--batch-sizes")
    if max(sizes) == 1:
        raise ConfigError(
            "--batch-sizes", ["give at least one size above 1: an image alone depends on no other"]
        )
    sweep_sizes = None if sweep is None else parse_sizes(sweep, "--sweep")
    if tta is not None and (batch_invariant or sweep is not None or gap):
        raise ConfigError(
            "--tta", ["cannot be combined with --batch-invariant, --sweep or --gap; leave them out"]
        )
    _check_outputs(save, plot, checkpoint, sweep=sweep is not None, gap=gap)
    exported = find_export(checkpoint)
    if exported is not None:
        given = {"--model": model, "--model-arg": model_args, "--key": key, "--partial": partial}
        given |= {"--normalization": normalization, "--logits": logits}
        refuse(checkpoint, given)
        refuse(checkpoint, {"--device": device}, "it is computed on the CPU")
        refuse(checkpoint, {"--engine": engine}, "it has its engine")
        refuse(checkpoint, {"--gap": gap, "--sweep": sweep}, "it has no train mode")
        overrides = effective_overrides("eval of an exported file", overrides, data_root=data_root)
        subject = open_exported(exported, overrides, batch_invariant=batch_invariant)
    else:
        overrides = effective_overrides("eval", overrides, device=device, data_root=data_root, engine=engine)
        named = named_network(model, model_args, key, partial, normalization, logits)
        subject = open_subject(
            checkpoint, overrides, command="eval", batch_invariant=batch_invariant, named=named
        )
    check_engine(subject, processes=last_words() is not None, gap=gap, sweep=sweep)
    asked = _Asked(sweep_sizes or (), num_calibration_images if gap else None, tta)
    with shared_work(subject, asked=asked, batch_invariant=batch_invariant) as work:
        dataset = load_subject_data(subject, processes=work.processes)
        check_labels(dataset, "bncli predict needs none")
        first = range(min(len(dataset.test), subject.config.runtime.eval_batch_size))
        subject = with_engine(subject, lambda: pick(dataset.test, first))
        known = _evaluate(subject, dataset, asked, work.ranks)
    if not work.is_main:
        return 0  # the rest is about the computations of one process
    report = _examine(checkpoint, subject, dataset, known, num_images, sizes)
    if save is not None:
        _save_certificate(report, checkpoint, save)
    if plot is not None:
        _plot(report, plot)
    print_json(report.to_dict()) if as_json else show_eval(report, details=details)
    return 0 if report.found.passed else 1


def _check_outputs(save: Path | None, plot: Path | None, *inputs: Path, sweep: bool, gap: bool) -> None:
    """Refuse before the work begins what could not be written after it."""
    if save is not None:
        check_writable(save, *inputs)
    if plot is not None:
        from bncli.cli.plots.figure import check_suffix

        if sweep == gap:
            wanted = (
                "draws one picture, so leave out --gap or --sweep"
                if gap
                else ("draws the sweep or the gap, so add --sweep 1,2,4,8,16,32,64,128,256, or --gap")
            )
            raise ConfigError("--plot", [wanted])
        check_suffix(plot)
        check_writable(plot, *inputs)


def _evaluate(subject: "Subject", dataset: "Dataset", asked: _Asked, ranks: "Ranks") -> "Evaluations":
    """What several processes find together, each on its part of the images."""
    from bncli.cli.progress import ProgressReporter
    from bncli.data import sample_batches
    from bncli.evaluation.examine import evaluate_whole
    from bncli.training import training_sample

    runtime, batch_size = subject.runtime, subject.config.runtime.eval_batch_size
    test, several = dataset.test, max(2, batch_size)  # one image alone may have no variance
    training = None
    if asked.num_calibration_images is not None:
        training = training_sample(dataset.train, runtime, several, asked.num_calibration_images, ranks)
    with runtime.autocast(), ProgressReporter() as progress:
        return evaluate_whole(
            subject.model,
            test,
            training,
            shuffled=lambda: (
                (runtime.place(images), labels)
                for images, labels in sample_batches(
                    test, several, len(test), rank=ranks.rank, num_ranks=ranks.size
                )
            ),
            batch_size=batch_size,
            sweep=asked.sweep,
            views=asked.views,
            place=runtime.place,
            group=ranks.group,
            progress=progress,
        )


def _examine(
    path: Path,
    subject: "Subject",
    dataset: "Dataset",
    known: "Evaluations",
    num_images: int,
    batch_sizes: tuple[int, ...],
) -> "EvalReport":
    from bncli.cli.progress import ProgressReporter
    from bncli.cli.tables.eval import EvalReport
    from bncli.evaluation import examine
    from bncli.hardware import describe_machine

    runtime = subject.runtime
    with runtime.autocast(), ProgressReporter() as progress:
        found = examine(
            subject.model,
            dataset.test,
            num_images=num_images,
            batch_sizes=batch_sizes,
            batch_size=subject.config.runtime.eval_batch_size,
            place=runtime.place,
            known=known,
            progress=progress,
        )
    return EvalReport(
        checkpoint=str(path),
        epoch=subject.epoch,
        network=subject.describe_network(),
        dataset=dataset.name,
        class_names=dataset.class_names,
        found=found,
        runtime=subject.describe_runtime(),
        machine=describe_machine(),
        folding=None if subject.engine_network is None else subject.engine_network.sentence,
    )


def _save_certificate(report: "EvalReport", checkpoint: Path, path: Path) -> None:
    from bncli.checkpoints import file_sha256
    from bncli.cli.result_file import result_file
    from bncli.serialization import to_json

    text = to_json(report.certificate_dict(file_sha256(checkpoint)), in_lines=True) + "\n"
    with result_file(path, "the certificate") as file:
        file.write(text.encode())
    print_note(f"wrote {path}")


def _plot(report: "EvalReport", path: Path) -> None:
    from bncli.cli.plots.gap import plot_gap
    from bncli.cli.plots.sweep import plot_sweep

    epoch = "" if report.epoch is None else f", epoch {report.epoch}"
    source = (
        f"{report.dataset}, {report.found.evaluation.num_images:,} test images{epoch},"
        f" {report.runtime['precision']}."
    )
    if report.found.gap is not None:
        calibration = f"Population statistics of {report.found.gap.num_calibration_images:,} training images."
        plot_gap(report.found.gap, path, source=f"{source} {calibration}")
    else:
        bands = "Bands: 95 % confidence intervals."
        num_classes = len(report.class_names)
        plot_sweep(report.found.sweep, path, source=f"{source} {bands}", num_classes=num_classes)
    print_note(f"wrote {path}")
