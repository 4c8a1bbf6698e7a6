"""A run made ready: a new one in a new directory, or one that continues where its last checkpoint is."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bncli.checkpoints import Checkpoint, load_checkpoint
from bncli.config import Config
from bncli.config_file import load_config
from bncli.data import Progress
from bncli.distributed import Processes
from bncli.errors import CheckpointError, RunError
from bncli.network_name import is_same_name
from bncli.training.run import Run
from bncli.training.run_dir import created, keep_metrics_until, reopened, save_config, writing
from bncli.training.setup import prepare

# what may change when a run is resumed: where the data lies, how it is computed, how long it goes on, how
# often it is saved, and what is done with the result
CHANGEABLE = (
    "data.root",
    "data.url",
    "data.archive",
    "data.cache",
    "runtime.",
    "train.epochs",
    "train.checkpoint_every",
    "train.checkpoint_unit",
    "train.keep_epochs",
    "train.log",
    "train.recalibrate",
)


@contextlib.contextmanager
def open_run(
    run_dir: Path,
    config: Config,
    *,
    resume: bool,
    data_progress: Progress | None,
    processes: Processes | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Run]:
    """The run, alone in its directory for as long as the block lasts.

    Of several processes rank 0 alone looks into the directory, and tells the others what it found.

    Raises:
        BncliError: on a configuration, data or directory that cannot be used or is in use, and when
            `resume` would continue another run than the one that is there.
    """
    is_main = processes is None or processes.is_main
    if processes is not None:
        resume = processes.from_main(resume)
    if not resume:
        # first: what cannot run leaves no directory
        setup = prepare(config, progress=data_progress, processes=processes)
        with created(run_dir, config) if is_main else contextlib.nullcontext():
            yield Run.start(setup, stop)
        return
    if not is_main and processes is not None:
        told: tuple[Checkpoint | None, int | None] | None = processes.from_main(None)
        assert told is not None  # what rank 0 tells below
        last, threads = told
        yield _resumed(run_dir, config, last, threads, data_progress, processes, stop)
        return
    with reopened(run_dir):
        last = _load_last(run_dir, config)
        # a run that goes on had its data: if they are gone, nobody asked for a download
        former = _recorded_threads(last)
        # as before, since sums round as they are split; but a file starts no more threads than there are CPUs
        threads = former if former is not None and former <= (os.cpu_count() or 1) else None
        if processes is not None:
            processes.from_main((last, threads))
        run = _resumed(run_dir, config, last, threads, data_progress, processes, stop)
        run.former_threads = former
        with writing(run_dir):
            save_config(run_dir, config)  # resumed once more, it goes on as it was told now
            keep_metrics_until(run_dir / "metrics.jsonl", run.epoch)
        yield run


def _resumed(
    run_dir: Path,
    config: Config,
    last: Checkpoint | None,
    threads: int | None,
    data_progress: Progress | None,
    processes: Processes | None,
    stop: Callable[[], bool],
) -> Run:
    """The run after its last checkpoint, if it has one; `threads` where none are configured."""
    setup = prepare(
        config, progress=data_progress, may_download=False, default_threads=threads, processes=processes
    )
    try:
        run = Run.restore(setup, last, stop) if last else Run.start(setup, stop)
    except (CheckpointError, RunError) as error:
        raise type(error)(f"{run_dir / 'last.pt'}: {error}") from None
    if last is not None:
        processes_before = last.runtime.get("processes", 1)
        run.former_processes = processes_before if isinstance(processes_before, int) else None
    return run


def _load_last(run_dir: Path, config: Config) -> Checkpoint | None:
    """The checkpoint to resume from; None for a run that was killed before its first one.

    Raises:
        RunError: when its configuration was another one.
        CheckpointError: when the checkpoint cannot be read.
    """
    path = run_dir / "last.pt"
    last = load_checkpoint(path) if path.exists() else None
    former = last.config if last else load_config(run_dir / "config.yaml")
    differences = _differences(former.model_dump(), config.model_dump())
    refused = [
        text
        for key, text in differences.items()
        if not key.startswith(CHANGEABLE) and not _has_moved(key, former, config)
    ]
    if refused:
        raise RunError(f"{run_dir}: cannot resume with another configuration: {'; '.join(refused)}")
    if last and config.train.epochs < last.epoch + (last.running_epoch is not None):
        raise RunError(
            f"{run_dir}: cannot resume with train.epochs={config.train.epochs}: it is in epoch"
            f" {last.epoch + 1} already"
            if last.running_epoch is not None
            else f"{run_dir}: cannot resume with train.epochs={config.train.epochs}: it has finished"
            f" {last.epoch} already"
        )
    return last


def _has_moved(key: str, former: Config, config: Config) -> bool:
    """Whether that key names code of the user's own whose file only lies elsewhere now."""
    names = {
        "model.name": (config.model.name, former.model.name),
        "data.name": (config.data.name, former.data.name),
    }
    return key in names and is_same_name(*names[key])


def _recorded_threads(last: Checkpoint | None) -> int | None:
    """The threads that the run had, whether PyTorch, a quota or its user chose them."""
    threads = last.runtime.get("threads") if last else None
    return threads if isinstance(threads, int) and threads > 0 else None


def _differences(before: object, after: object, key: str = "") -> dict[str, str]:
    """Dotted keys whose values differ, each with a text that shows both."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, str] = {}
        for name in before | after:
            found |= _differences(before.get(name), after.get(name), f"{key}.{name}".lstrip("."))
        return found
    return {} if before == after else {key: f"{key} was {before!r}, now {after!r}"}
