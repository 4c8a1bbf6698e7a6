"""`bncli export`: a checkpoint's network as a file for an engine, with the proof that it is right."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bncli.cli.export_source import ExportSource, open_export_source, proving_images
from bncli.cli.help_page import CHECKED, COMPUTED, OUTPUT, SHOWN
from bncli.cli.messages import print_note
from bncli.cli.named_network import named_network
from bncli.cli.options import (
    CheckpointArgument,
    DataRootOption,
    JsonOption,
    KeyOption,
    LogitsOption,
    ModelArgOption,
    ModelOption,
    NormalizationOption,
    PartialOption,
    SetOption,
    check_new,
)
from bncli.cli.overrides import effective_overrides
from bncli.errors import BncliError, CheckpointError, ConfigError

if TYPE_CHECKING:
    from bncli.export.export_network import Exported


def export_checkpoint(
    checkpoint: CheckpointArgument,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The file to write: .onnx, .pt2 (PyTorch's torch.export), .xml (OpenVINO) or .safetensors"
            " (tensors only).",
            rich_help_panel=OUTPUT,
        ),
    ],
    model: ModelOption = None,
    model_args: ModelArgOption = None,
    key: KeyOption = None,
    partial: PartialOption = None,
    normalization: NormalizationOption = None,
    logits: LogitsOption = None,
    fold: Annotated[
        bool | None,
        typer.Option(
            "--fold/--keep-batch-norm",
            help="Fold BatchNorm into the layers next to it, where that is exact.  [default: fold, but for"
            " .safetensors]",
            rich_help_panel=COMPUTED,
        ),
    ] = None,
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(
            metavar="TYPE",
            help="The type of the weights of convolutions and linear layers: float32, bfloat16 or float16.",
            rich_help_panel=COMPUTED,
        ),
    ] = "float32",
    pixels: Annotated[
        Literal["uint8", "float32"],
        typer.Option(
            "--pixels",
            metavar="TYPE",
            help="The images that the file takes: uint8 from 0 to 255, or float32 from 0 to 1. It normalises"
            " them itself.",
            rich_help_panel=COMPUTED,
        ),
    ] = "uint8",
    num_images: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Prove the file on this many test images; random ones where there are none.",
            rich_help_panel=CHECKED,
        ),
    ] = 256,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Prove it on the images of this folder.", rich_help_panel=CHECKED
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="How much an output may differ, as a part of the largest of its image.  [default: 0.001 in"
            " float32, 0.01 in float16, 0.05 in bfloat16]",
            rich_help_panel=CHECKED,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Write the file although its statistics are wrong, or the proof fails.",
            rich_help_panel=CHECKED,
        ),
    ] = False,
    overrides: SetOption = None,
    data_root: DataRootOption = None,
    details: Annotated[
        bool, typer.Option("--details", help="Also show every layer.", rich_help_panel=SHOWN)
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Write a network for another engine, and prove it.

    BatchNorm is folded away, and the file is opened again: it must compute what the checkpoint does. Exit
    code 1 if it does not; then nothing is written. `bncli eval` and `bncli predict` take the file.

    Examples:
    bncli export runs/first/last.pt -o net.pt2
    bncli export runs/first/last.pt -o folded.safetensors --fold --details
    bncli export runs/first/last.pt -o half.pt2 --precision bfloat16
    """
    from bncli.cli.tables.export import export_document, show_export
    from bncli.cli.tables.table import print_json
    from bncli.export.exported_file import exported_file
    from bncli.export.write import format_of, require_writer

    kind = format_of(output)
    if kind == "onnx" and precision == "bfloat16":
        raise ConfigError(
            "--precision", ["ONNX Runtime has no convolution in bfloat16; take float16, or .xml"]
        )
    if kind == "openvino" and fold is False:
        reason = "OpenVINO folds BatchNorm itself when it writes a file; take .onnx, .pt2 or .safetensors"
        raise ConfigError("--keep-batch-norm", [reason])
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ConfigError("--tolerance", [f"expected a finite number of 0 or more, found {tolerance:g}"])
    require_writer(kind)
    check_output(output, checkpoint)
    if exported_file(checkpoint) is not None:
        raise CheckpointError(
            f"{checkpoint}: is an exported file already; export the checkpoint that it was made from"
        )
    named = named_network(model, model_args, key, partial, normalization, logits)
    overrides = effective_overrides("export", overrides, data_root=data_root)
    source = open_export_source(checkpoint, overrides, named)
    _check_statistics(source, checkpoint, force=force)
    record = source.record(pixels, precision)
    found = _export(source, output, record, num_images, images, tolerance, fold=fold, force=force)
    if as_json:
        print_json(export_document(str(checkpoint), str(output), found))
    else:
        show_export(str(checkpoint), str(output), found, details=details)
    return 0 if found.proof.holds else 1


def check_output(output: Path, checkpoint: Path) -> None:
    """Refuse before the work begins what could not be written after it, and what is there already."""
    names = [output] if output.suffix.lower() != ".xml" else [output, output.with_suffix(".bin")]
    for name in names:
        check_new(name, checkpoint)


def _check_statistics(source: ExportSource, path: Path, *, force: bool) -> None:
    from bncli.export import problems_of

    problems = problems_of(source.model, source.findings())
    if problems and not force:
        raise CheckpointError(
            f"{path}: its eval mode is not what was trained: {'; '.join(problems)} (see bncli inspect-stats);"
            " --force exports it all the same"
        )
    for problem in problems:
        print_note(f"exported all the same: {problem}")


def _export(source, output, record, num_images, folder, tolerance, *, fold, force) -> "Exported":  # type: ignore[no-untyped-def]
    import torch

    from bncli.cli.progress import ProgressReporter
    from bncli.export.export_network import export_network

    images, what = proving_images(source, num_images, folder)
    if source.is_pixels and record.pixels == "float32":
        images = images.to(torch.float32) / 255
    try:
        with ProgressReporter() as progress:
            return export_network(
                source.model,
                output,
                images,
                record,
                fold=fold,
                what=what,
                tolerance=tolerance,
                threads=source.subject.runtime.threads,
                force=force,
                progress=progress,
            )
    except OSError as error:
        raise BncliError(f"{output}: cannot be written: {error.strerror or error}") from error
