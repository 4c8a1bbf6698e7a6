"""`bncli train`: from a YAML file to checkpoints."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption, SetOption
from bncli.cli.stop_signals import StopSignals
from bncli.errors import ConfigError, StoppedError


def train_config(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A YAML file; not needed with --resume.")
    ] = None,
    overrides: SetOption = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to write; default: runs/NAME-DATE-TIME."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Continue the run in this directory.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained, and train nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Train a Conv-BN-ReLU network and save checkpoints with its running statistics."""
    if (config is None) == (resume is None):
        raise ConfigError("bncli train", ["give a CONFIG.yaml, or --resume with a run directory"])
    if resume is not None and run_dir is not None:
        raise ConfigError("bncli train", ["--resume continues in its own directory; leave --run-dir out"])

    from bncli.config import Cifar10Config
    from bncli.config_file import load_config
    from bncli.data import cifar10_files

    if resume is not None:
        from bncli.training.run_dir import find_config

        config = find_config(resume)
    loaded = load_config(config, overrides)
    if isinstance(loaded.data, Cifar10Config):
        # before torch is imported, which takes longer than reading
        cifar10_files.read_ahead(Path(loaded.data.root).expanduser())

    from bncli.batchnorm.audit.rules import describe_large_momentum
    from bncli.cli.progress import DataReporter, TrainReporter
    from bncli.cli.tables.table import print_json
    from bncli.cli.tables.training import show_dry_run, show_training
    from bncli.training import EpochDone, Started, StepDone, describe_setup, prepare, train
    from bncli.training.run_dir import default_run_dir

    effect = describe_large_momentum(loaded.model.batch_norm.momentum)
    if effect is not None:
        print_note(
            f"warning: model.batch_norm.momentum: {effect}; PyTorch's momentum is the weight of the new"
            " batch, 0.01 for Keras's 0.99"
        )
    if dry_run:
        description = describe_setup(prepare(loaded, progress=DataReporter()))
        print_json(description) if as_json else show_dry_run(description)
        return 0

    target = resume or run_dir or default_run_dir(config)
    with TrainReporter() as reporter, StopSignals() as signals:

        def report(event: Started | StepDone | EpochDone) -> None:
            if isinstance(event, Started):
                signals.defer()  # from here on a stop saves
            reporter(event)

        try:
            result = train(
                loaded,
                target,
                resume=bool(resume),
                report=report,
                stop=signals.stop_requested,
                data_progress=DataReporter(),
            )
        except StoppedError as stopped:
            print_note(str(stopped))
            return signals.exit_code
        except KeyboardInterrupt:
            begun = (target / "config.yaml").is_file()
            hint = f"; continue with: bncli train --resume {shlex.quote(str(target))}" if begun else ""
            print_note(f"interrupted{hint}")
            return signals.exit_code
    print_json(result) if as_json else show_training(result)
    return 0
