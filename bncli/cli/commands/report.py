"""`bncli report`: a page about a network's BatchNorm layers that one opens in a browser."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bncli.cli.help_page import MEASURED, OUTPUT
from bncli.cli.messages import print_note
from bncli.cli.named_network import as_typed, named_network
from bncli.cli.opened_checkpoint import load_subject_data, open_subject
from bncli.cli.options import (
    ANY_CHECKPOINT,
    DataRootOption,
    DeviceOption,
    JsonOption,
    KeyOption,
    LayerOption,
    LogitsOption,
    ModelArgOption,
    ModelOption,
    NormalizationOption,
    PartialOption,
    SetOption,
    check_writable,
    matching_layers,
)
from bncli.cli.overrides import effective_overrides
from bncli.cli.report_file import NAME, open_in_browser, save_report
from bncli.errors import ConfigError

if TYPE_CHECKING:
    from bncli.cli.opened_checkpoint import Subject
    from bncli.report import Measurement

DEFAULT_NUM_IMAGES = 1_000


def write_report(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help=f"The folder of a run of `bncli train`, or a checkpoint; or two to be compared."
            f" {ANY_CHECKPOINT}",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help=f"The file to write.  [default: {NAME} in the folder of the run, else in this one]",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    open_it: Annotated[
        bool, typer.Option("--open", help="Open it in the browser.", rich_help_panel=OUTPUT)
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Also compute with the network's images: accuracy by batch size, which layer costs"
            " accuracy, and what enters a layer.",
            rich_help_panel=MEASURED,
        ),
    ] = False,
    num_images: Annotated[
        int,
        typer.Option(
            min=2,
            metavar="N",
            help="--measure takes this many test images and as many training images.",
            rich_help_panel=MEASURED,
        ),
    ] = DEFAULT_NUM_IMAGES,
    layer: LayerOption = None,
    model: ModelOption = None,
    model_args: ModelArgOption = None,
    key: KeyOption = None,
    partial: PartialOption = None,
    normalization: NormalizationOption = None,
    logits: LogitsOption = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    data_root: DataRootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Draw it all on one page, to be opened in a browser.

    One file, which loads nothing from anywhere: a verdict, findings with their channels, a map of all
    channels; of a run also how its running statistics followed the batches.

    Examples:
    bncli report runs/first
    bncli report runs/first --measure --num-images 500
    bncli report runs/first/best.pt runs/first/last.pt -o moved.html
    """
    if len(sources) > 2:
        raise ConfigError("bncli report", [f"give one SOURCE, or two to be compared, not {len(sources)}"])
    if measure and len(sources) == 2:
        raise ConfigError("--measure", ["measures one network; leave the other SOURCE out"])
    options = {"--model": model, "--set": overrides, "--device": device, "--data-root": data_root}
    given = [name for name, value in options.items() if value]
    same = options | {  # those that `recalibrate` has too
        "--model-arg": model_args,
        "--key": key,
        "--partial": partial,
        "--normalization": normalization,
        "--logits": logits,
    }
    if given and not measure:
        raise ConfigError(", ".join(given), ["what is read needs no network and no images; add --measure"])
    from bncli.cli.tables.table import print_json
    from bncli.report import DrawingLibrary, checkpoint_of, read_content
    from bncli.report.verdict import judge, remedy

    target = output or _default_output(sources)
    check_writable(target, *sources)
    library = DrawingLibrary()
    found = read_content(sources, key)
    for note in found.notes:
        print_note(note)
    if layer is not None:
        found = found.of_layers({one.name for one in matching_layers(found.layers, layer)})
    if measure:
        overrides = effective_overrides("report", overrides, device=device, data_root=data_root)
        named = named_network(model, model_args, key, partial, normalization, logits)
        path = checkpoint_of(sources[0])
        subject = open_subject(path, overrides, command="report", named=named)
        words = ["bncli", "recalibrate", as_typed(path), *_words(same)]
        found = replace(found, measurement=_measure(subject, num_images), how_to_repair=shlex.join(words))
    size = save_report(found, library, target)
    if open_it:
        open_in_browser(target)
    if as_json:
        grave = [finding.severity for finding in found.findings]
        print_json(
            {
                "report": str(target),
                "sources": sources,
                "verdict": " ".join(judge(found)),
                "remedy": remedy(found) or None,
                "num_bytes": size,
                "num_layers": len(found.layers),
                "num_errors": grave.count("error"),
                "num_warnings": grave.count("warning"),
                "measured": measure,
            }
        )
    else:
        from bncli.cli.tables.table import console_for_results, print_wrapped

        console = console_for_results()
        for sentence in judge(found):
            print_wrapped(console, sentence)
        if command := remedy(found):
            print(f"to repair it   {command}")
        print(f"report         {target}")
    return 0


def _default_output(sources: list[str]) -> Path:
    folder = Path(sources[0])
    return folder / NAME if len(sources) == 1 and folder.is_dir() else Path(NAME)


def _words(options: Mapping[str, Any]) -> list[str]:
    """The options that were given, as one types them."""
    return [
        word
        for name, value in options.items()
        if value
        for one in (value if isinstance(value, list | tuple) else [value])
        for word in (name, str(one))
    ]


def _measure(subject: "Subject", num_images: int) -> "Measurement":
    from bncli.cli.progress import ProgressReporter
    from bncli.report import measure
    from bncli.training import training_sample

    dataset = load_subject_data(subject)
    runtime, batch_size = subject.runtime, max(2, subject.config.runtime.eval_batch_size)
    with runtime.autocast(), ProgressReporter() as progress:
        return measure(
            subject.model,
            dataset.test,
            training_sample(dataset.train, runtime, batch_size, num_images),
            dataset=dataset.name,
            num_images=num_images,
            batch_size=batch_size,
            place=runtime.place,
            progress=progress,
        )
