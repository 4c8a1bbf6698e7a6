"""`bncli demo`: running statistics ruined on purpose. Is it noticed, and is it repaired?"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bncli.cli.help_page import MEASURED, OUTPUT
from bncli.cli.messages import print_note
from bncli.cli.opened_checkpoint import load_subject_data, open_subject
from bncli.cli.options import DataRootOption, DeviceOption, JsonOption, SetOption, make_empty_dir
from bncli.cli.overrides import effective_overrides
from bncli.errors import BncliError

if TYPE_CHECKING:
    from bncli.cli.opened_checkpoint import Subject


def demonstrate_repair(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A file that `bncli train` saved; without it, a small network is trained first (a minute in"
            " all).",
        ),
    ] = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    data_root: DataRootOption = None,
    num_images: Annotated[
        int,
        typer.Option(
            min=2,
            metavar="N",
            help="Measure population statistics on this many training images.",
            rich_help_panel=MEASURED,
        ),
    ] = 5_000,
    save_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Save the ruined checkpoints in this new folder.", rich_help_panel=OUTPUT
        ),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Ruin running statistics in four ways, find and repair it.

    Shows for a trained network how accuracy falls when its running statistics are wrong, which rule of
    inspect-stats finds it, and what recalibrate brings back. The checkpoint itself is only read.

    Examples:
    bncli demo
    bncli demo runs/first/last.pt --save-dir ruined
    """
    from bncli.cli.progress import ProgressReporter
    from bncli.cli.tables.demo import describe_demonstration, show_demonstration
    from bncli.cli.tables.table import print_json
    from bncli.demo import demonstrate

    command = "demo" if checkpoint is None else "demo CHECKPOINT"
    overrides = effective_overrides(command, overrides, device=device, data_root=data_root)
    if checkpoint is not None:
        subject = open_subject(checkpoint, overrides, command=command)
    if save_dir is not None:
        make_empty_dir(save_dir)
    if checkpoint is None:
        subject = _train_subject(overrides)
    dataset = load_subject_data(subject)
    with ProgressReporter() as progress:
        result = demonstrate(
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
    print_json(describe_demonstration(result)) if as_json else show_demonstration(result)
    return 0


def _train_subject(overrides: list[str] | None) -> "Subject":
    """The network of the quickstart, whose values are the defaults; its run directory is removed."""
    from bncli.cli.progress import TrainReporter
    from bncli.config import Config
    from bncli.config_file import config_from_dict
    from bncli.training import train

    config = config_from_dict(Config().model_dump(mode="json"), overrides, source="bncli demo")
    print_note("no CHECKPOINT is given, so a small network is trained first")
    try:
        directory = tempfile.TemporaryDirectory(prefix="bncli-demo-")
    except OSError as error:
        problem = f"cannot make a temporary directory: {error.strerror or error}"
        raise BncliError(f"{problem}; set TMPDIR to a directory that can be written") from None
    with directory as folder, TrainReporter() as reporter:
        result = train(config, Path(folder) / "run", report=reporter, data_progress=reporter.data)
        return open_subject(result.checkpoint, overrides, command="demo", trusted=config.model.name)
