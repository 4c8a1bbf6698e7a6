"""`bncli eval`: accuracy in eval mode, and on what a prediction depends beside its image."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bncli.cli.messages import print_note
from bncli.cli.options import (
    BatchInvariantOption,
    CheckpointArgument,
    JsonOption,
    SetOption,
    check_writable,
    parse_sizes,
)
from bncli.cli.subject import load_subject_data, open_subject
from bncli.errors import ConfigError

if TYPE_CHECKING:
    from torch.nn import Module

    from bncli.cli.subject import Subject
    from bncli.cli.tables.evaluation import EvalReport
    from bncli.data import Dataset, Split
    from bncli.evaluation import AugmentedEvaluation, Gap, SweepPoint
    from bncli.evaluation.views import Views


def evaluate_checkpoint(
    checkpoint: CheckpointArgument,
    overrides: SetOption = None,
    num_images: Annotated[int, typer.Option(min=1, help="Test images for the certificate.")] = 256,
    batch_sizes: Annotated[
        str, typer.Option(metavar="N,N,...", help="Batch sizes of the certificate.")
    ] = "2,3,7,16,64,256",
    batch_invariant: BatchInvariantOption = False,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the certificate as a JSON file.")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Measure accuracy in batches of these sizes, in both modes."),
    ] = None,
    gap: Annotated[
        bool, typer.Option("--gap", help="Take the gap between train and eval mode apart: is it BatchNorm?")
    ] = False,
    num_calibration_images: Annotated[
        int, typer.Option(min=2, help="Training images that --gap measures population statistics on.")
    ] = 10_000,
    tta: Annotated[
        Literal["flip", "shifts"] | None,
        typer.Option("--tta", help="Report apart what averaging over views of each image gives."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the sweep or the gap to a .png or .svg file.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Evaluate in eval mode, and certify that a prediction depends on its image alone.

    Exit code 1 if a prediction depends on the batch in eval mode; with --batch-invariant, if one bit does.
    """
    from bncli.cli.tables.evaluation import show_eval
    from bncli.cli.tables.table import print_json

    sizes = parse_sizes(batch_sizes, "--batch-sizes")
    if max(sizes) == 1:
        raise ConfigError("--batch-sizes", ["expected a size above 1: an image alone has no neighbours"])
    sweep_sizes = None if sweep is None else parse_sizes(sweep, "--sweep")
    if tta is not None and (batch_invariant or sweep is not None or gap):
        raise ConfigError("--tta", ["goes with none of --batch-invariant, --sweep and --gap; leave them out"])
    _check_outputs(save, plot, sweep=sweep is not None, gap=gap)
    subject = open_subject(checkpoint, overrides, batch_invariant=batch_invariant)
    calibration = num_calibration_images if gap else None
    report = _examine(checkpoint, subject, num_images, sizes, sweep_sizes or (), calibration, tta)
    if save is not None:
        _save_certificate(report, checkpoint, save)
    if plot is not None:
        _plot(report, plot)
    print_json(report.to_dict()) if as_json else show_eval(report)
    return 0 if report.passed else 1


def _check_outputs(save: Path | None, plot: Path | None, *, sweep: bool, gap: bool) -> None:
    """Refuse before the work begins what could not be written after it."""
    if save is not None:
        check_writable(save)
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
        check_writable(plot)


def _examine(
    path: Path,
    subject: "Subject",
    num_images: int,
    batch_sizes: tuple[int, ...],
    sweep: tuple[int, ...],
    num_calibration_images: int | None,
    views: "Views | None",
) -> "EvalReport":
    from bncli.cli.tables.evaluation import EvalReport
    from bncli.data import sequential_batches
    from bncli.determinism import certify
    from bncli.evaluation import evaluate
    from bncli.hardware import describe_machine

    model, runtime, rows = subject.model, subject.runtime, subject.fixed_rows or 1
    dataset = load_subject_data(subject)
    test, batch_size = dataset.test, subject.config.runtime.eval_batch_size
    batch_size = -(-batch_size // rows) * rows  # whole chunks: the same bits, and no padding to pay for
    with runtime.autocast():
        batches = sequential_batches(test, batch_size)
        evaluation = evaluate(model, ((runtime.place(images), labels) for images, labels in batches))
        certificate = certify(model, runtime.place(test.images[:num_images]), batch_sizes=batch_sizes)
        points = _sweep(model, test, sweep) if sweep else ()
        gap = None
        if num_calibration_images is not None:
            gap = _measure_gap(subject, dataset, num_calibration_images)
        tta = None if views is None else _evaluate_views(subject, test, views)
    return EvalReport(
        checkpoint=str(path),
        epoch=subject.checkpoint.epoch,
        dataset=dataset.name,
        class_names=dataset.class_names,
        evaluation=evaluation,
        determinism=certificate,
        fixed_rows=subject.fixed_rows,
        sweep=points,
        gap=gap,
        tta=tta,
        runtime=runtime.describe(),
        machine=describe_machine(),
    )


def _sweep(model: "Module", test: "Split", sizes: tuple[int, ...]) -> "tuple[SweepPoint, ...]":
    from bncli.cli.progress import DataReporter
    from bncli.evaluation import sweep_batch_sizes

    reporter = DataReporter()
    return sweep_batch_sizes(
        model,
        test.images,
        test.labels,
        sizes,
        progress=lambda done, total: reporter("passes over the test split", done, total),
    )


def _measure_gap(subject: "Subject", dataset: "Dataset", num_images: int) -> "Gap":
    """The test images and a sample of the training images, both in random order."""
    from bncli.cli.phase_progress import PhaseReporter
    from bncli.data import sample_batches
    from bncli.determinism.fixed_shape import without_fixed_shape
    from bncli.evaluation import measure_gap
    from bncli.training import training_sample

    runtime, test = subject.runtime, dataset.test
    batch_size = max(2, subject.config.runtime.eval_batch_size)  # one image alone may have no variance
    with PhaseReporter() as progress:
        return measure_gap(
            without_fixed_shape(subject.model),
            lambda: (
                (runtime.place(images), labels)
                for images, labels in sample_batches(test, batch_size, len(test))
            ),
            training_sample(dataset.train, runtime, batch_size, num_images),
            progress=progress,
        )


def _evaluate_views(subject: "Subject", test: "Split", views: "Views") -> "AugmentedEvaluation":
    from bncli.data import sequential_batches
    from bncli.evaluation import evaluate_augmented

    batches = sequential_batches(test, subject.config.runtime.eval_batch_size)
    place = subject.runtime.place
    return evaluate_augmented(subject.model, ((place(images), labels) for images, labels in batches), views)


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

    source = (
        f"{report.dataset}, {report.evaluation.num_images:,} test images, epoch {report.epoch},"
        f" {report.runtime['precision']}."
    )
    if report.gap is not None:
        calibration = f"Population statistics of {report.gap.num_calibration_images:,} training images."
        plot_gap(report.gap, path, source=f"{source} {calibration}")
    else:
        bands = "Bands: 95 % confidence intervals."
        num_classes = len(report.class_names)
        plot_sweep(report.sweep, path, source=f"{source} {bands}", num_classes=num_classes)
    print_note(f"wrote {path}")
