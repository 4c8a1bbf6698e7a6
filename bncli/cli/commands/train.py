"""`bncli train`: from a configuration to checkpoints."""

import shlex
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bncli.builtin_configs import DEFAULT_NAME
from bncli.cli.help_page import OUTPUT, RUN
from bncli.cli.messages import print_note
from bncli.cli.one_voice import last_words
from bncli.cli.options import DataRootOption, DeviceOption, JsonOption, complete_config, set_option
from bncli.cli.overrides import effective_overrides
from bncli.cli.report_file import RunReport
from bncli.cli.stop_signals import StopSignals
from bncli.distributed.launch import launched
from bncli.errors import ConfigError, RunError, StoppedError

if TYPE_CHECKING:
    from bncli.config import Config, DataConfig
    from bncli.data.recorded_root import DataRecord
    from bncli.recorded_config import FollowedConfig


def train_config(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or the name of a built-in configuration: see `bncli config`.  [default:"
            f" {DEFAULT_NAME}]",
            autocompletion=complete_config,
        ),
    ] = None,
    overrides: Annotated[list[str] | None, set_option("train.epochs=3")] = None,
    device: DeviceOption = None,
    data_root: DataRootOption = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The new folder that the run is saved in.  [default: runs/CONFIG-DATE-TIME]",
            rich_help_panel=RUN,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Continue the run that is saved in this folder. Goes without CONFIG and --run-dir.",
            rich_help_panel=RUN,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show the network, the data and the number of steps, and train nothing.",
            rich_help_panel=RUN,
        ),
    ] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Keep a page in the folder of the run, report.html, up to date after every epoch.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    open_report: Annotated[
        bool,
        typer.Option("--open", help="Like --report, and open it in the browser.", rich_help_panel=OUTPUT),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Train a network with BatchNorm and save its checkpoints.

    The folder of the run holds its configuration (config.yaml), the numbers of every epoch (metrics.jsonl),
    and two checkpoints: last.pt, of the last epoch, and best.pt, of the epoch with the best accuracy.
    Several processes train together under torchrun: see `bncli explain many-processes`.

    Examples:
    bncli train --run-dir runs/first
    bncli train --resume runs/first
    bncli train cifar10 --data-root data --set train.epochs=5
    """
    _check_options(config, run_dir, resume)
    launch = launched()

    from bncli.config import ConvNetConfig
    from bncli.config_file import load_config

    overrides = effective_overrides("train", overrides, device=device, data_root=data_root)
    if config is None and resume is None:
        print_note(f"no CONFIG given: training {DEFAULT_NAME}; `bncli config` lists others")
    followed = None if resume is None else _follow_run(resume, overrides)
    loaded = load_config(config, overrides) if followed is None else followed.config
    if launch is None or launch.local_rank == 0:
        _read_ahead(loaded.data, None if followed is None else followed.recorded_root)

    from bncli.batchnorm.audit.rules import describe_large_momentum
    from bncli.cli.progress import TrainReporter
    from bncli.cli.tables.table import print_json
    from bncli.cli.tables.train import show_training
    from bncli.training import EpochDone, Started, StepDone, train
    from bncli.training.run_dir import default_run_dir

    if resume is not None and followed is not None:
        loaded = _with_recorded_root(resume, followed)
    effect = None
    if isinstance(loaded.model, ConvNetConfig):
        effect = describe_large_momentum(loaded.model.batch_norm.momentum)
    if effect is not None:
        print_note(
            f"warning: model.batch_norm.momentum: {effect}; in PyTorch momentum is the weight of the new"
            " batch: 0.01 is what Keras calls 0.99"
        )
    if dry_run:
        return _dry_run(loaded, may_download=resume is None, as_json=as_json)

    target = resume or run_dir or default_run_dir(config)
    begun = launch is not None and launch.restarts > 0 and (target / "config.yaml").is_file()
    writes = launch is None or launch.is_main
    page = RunReport(target, wanted=(report or open_report) and writes, opens=open_report and writes)
    with TrainReporter() as reporter, StopSignals(only_first=last_words() is not None) as signals:

        def tell(event: Started | StepDone | EpochDone) -> None:
            if isinstance(event, Started):
                signals.defer()  # from here on a stop saves
            reporter(event)
            page.update(event)

        try:
            result = train(
                loaded,
                target,
                resume=bool(resume) or begun,
                report=tell,
                stop=signals.stop_requested,
                data_progress=reporter.data,
                words=last_words(),
            )
        except StoppedError as stopped:
            print_note(str(stopped))
            return signals.exit_code
        except KeyboardInterrupt:
            is_there = (target / "config.yaml").is_file()
            hint = f"; continue with: bncli train --resume {shlex.quote(str(target))}" if is_there else ""
            print_note(f"interrupted{hint}")
            return signals.exit_code
    print_json(result.to_dict()) if as_json else show_training(result)
    page.finish(silent=as_json)
    return 0


def _dry_run(config: "Config", *, may_download: bool, as_json: bool) -> int:
    """Show what a run would do."""
    from bncli.cli.progress import ProgressReporter
    from bncli.cli.tables.table import print_json
    from bncli.cli.tables.train import show_dry_run
    from bncli.training import describe_setup, prepare
    from bncli.training.setup import check_shares

    launch = launched()
    with ProgressReporter() as progress:
        setup = prepare(config, progress=progress, may_download=may_download)
    if launch is not None and launch.num_ranks > 1:
        check_shares(config, setup.plan, launch.num_ranks)
    for note in setup.dataset.notes:
        print_note(note)
    description = describe_setup(setup)
    print_json(description) if as_json else show_dry_run(description)
    return 0


def _check_options(config: Path | None, run_dir: Path | None, resume: Path | None) -> None:
    """Raise ConfigError for options that contradict each other."""
    launch, problem = launched(), None
    if config is not None and resume is not None:
        problem = "--resume continues with the run's own configuration; leave CONFIG out"
    elif resume is not None and run_dir is not None:
        problem = "--resume continues in its own directory; leave --run-dir out"
    elif launch is not None and launch.max_restarts > 0 and run_dir is None and resume is None:
        problem = "with --max-restarts it needs --run-dir, where a restart finds what was begun"
    if problem is not None:
        raise ConfigError("bncli train", [problem])


def _follow_run(run_dir: Path, overrides: list[str] | None) -> "FollowedConfig":
    """The configuration of a run, but for the places in it: a run directory may come from a stranger."""
    from bncli.config_file import load_config
    from bncli.network_name import is_inside, runs_foreign_code
    from bncli.recorded_config import follow_run
    from bncli.training.run_dir import find_config

    path = find_config(run_dir)
    followed = follow_run(load_config(path), overrides, source=str(path))
    for note in followed.notes.values():
        print_note(note)
    name = followed.config.model.name
    if runs_foreign_code(name) and is_inside(name, run_dir) and not followed.is_named("model.name"):
        raise RunError(
            f"{path}: its network is made by {name}, code inside the run directory, where `bncli train` puts"
            f" none; if you trust it: --set {shlex.quote(f'model.name={name}')}"
        )
    return followed


def _read_ahead(data: "DataConfig", recorded_root: str | None) -> None:
    """Begin to read CIFAR-10 before torch is imported, which takes longer than reading."""
    from bncli.config import Cifar10Config
    from bncli.data import cifar10_files
    from bncli.data.recorded_root import recorded_batches
    from bncli.data.user_path import user_path

    if not isinstance(data, Cifar10Config):
        return
    if recorded_root is not None:
        folders = recorded_batches(recorded_root)
    else:
        folders = list(islice(cifar10_files.batch_folders(user_path(data.root, "data.root")), 1))
    for folder in folders[:1]:
        cifar10_files.read_ahead(folder)


def _with_recorded_root(run_dir: Path, followed: "FollowedConfig") -> "Config":
    """The configuration with the recorded data.root, where that holds the data that the run began with."""
    from bncli.checkpoints import load_checkpoint
    from bncli.cli.opened_checkpoint import followed_data
    from bncli.cli.progress import ProgressReporter

    def record() -> "DataRecord":
        if not (run_dir / "last.pt").is_file():
            return None, ()
        last = load_checkpoint(run_dir / "last.pt")
        return last.data_digest, last.class_names

    with ProgressReporter() as progress:
        data, unfollowed = followed_data(followed, record, progress)
    if unfollowed.matters:
        print_note(unfollowed.of(run_dir / "config.yaml"))
    return followed.config.model_copy(update={"data": data})
