"""The directory of a run: config.yaml, metrics.jsonl, last.pt, best.pt, .lock. Never overwritten.

One process works in one run directory: the kernel gives its lock back when it dies, however it dies.
`flock` on the file `.lock`. The file stays behind and means nothing by itself: what counts is whether a
living process holds it; it says which. File systems without locks (some on the network) are used without
one.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shlex
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from bncli.atomic_file import atomic_file, sync_directory
from bncli.builtin_configs import DEFAULT_NAME
from bncli.config import Config
from bncli.config_file import dump_config
from bncli.errors import RunError
from bncli.serialization import to_json

LOCK_NAME = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the lock of an existing directory.

    Raises:
        RunError: when another process holds it, naming that process.
        OSError: when the file cannot be written.
    """
    # a link would lead to a file that is none of ours, and it is about to be overwritten
    handle = os.open(run_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "unknown"
            raise RunError(
                f"{run_dir}: another run is writing here (process {holder}); wait for it, or stop it"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} on {platform.node()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)  # which unlocks


RECALIBRATED = "recalibrated.pt"  # beside last.pt, from which training can still go on

# what `atomic_file` leaves behind when the process is killed in its midst
_LEFTOVER = re.compile(
    r"\.(config\.yaml|metrics\.jsonl|report\.html|(last|best|recalibrated|epoch-\d{4,})\.pt)"
    r"\.[a-z0-9_]{8}\.tmp"
)


def epoch_file(epoch: int) -> str:
    """The name of the file that keeps the network of one epoch."""
    return f"epoch-{epoch:04d}.pt"


def kept_epochs(run_dir: Path) -> list[Path]:
    """The files of single epochs that a run kept, in their order."""
    return sorted(path for path in run_dir.glob("epoch-*.pt") if re.fullmatch(r"epoch-\d{4,}\.pt", path.name))


def default_run_dir(config_path: str | Path | None) -> Path:
    """runs/NAME-DATE-TIME, which does not exist yet; without a configuration NAME is quickstart."""
    name = Path(config_path).stem if config_path else DEFAULT_NAME
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path("runs") / f"{name}-{stamp}"
    number = 2
    while path.exists():  # two runs started within one second
        path = Path("runs") / f"{name}-{stamp}-{number}"
        number += 1
    return path


def find_config(run_dir: Path) -> Path:
    """The configuration of the run in a directory.

    Raises:
        RunError: when there is no run in the directory.
    """
    path = run_dir / "config.yaml"
    if path.is_file():
        return path
    hint = ""
    if run_dir.is_dir() and not _foreign_files(run_dir):
        hint = f"; start it with `bncli train CONFIG --run-dir {shlex.quote(str(run_dir))}`"
    raise RunError(f"{run_dir}: no run to resume (it has no config.yaml){hint}")


@contextlib.contextmanager
def created(path: Path, config: Config) -> Iterator[None]:
    """Make the directory and write the resolved configuration into it; the block holds its lock.

    Raises:
        RunError: when there is something already, nothing can be written, or another run is writing.
    """
    with contextlib.ExitStack() as stack:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            if not (path / LOCK_NAME).exists():  # leave no lock in a directory that is none of ours
                _check_unused(path)
            stack.enter_context(locked(path))
            _check_unused(path)
            _remove_leftovers(path)
            save_config(path, config)
            sync_directory(path.parent)
        yield


@contextlib.contextmanager
def reopened(path: Path) -> Iterator[None]:
    """Take the lock of a run's directory for the block, and clear away what a killed process left.

    Raises:
        RunError: when there is no run, it cannot be written, or another process is writing it.
    """
    find_config(path)
    _check_own_files(path)
    with contextlib.ExitStack() as stack:
        with writing(path):
            stack.enter_context(locked(path))
            _remove_leftovers(path)
        yield


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing below `path` into an error for the user.

    Raises:
        RunError: naming the directory and the reason.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error} (the checkpoint before is intact)"
            if (path / "last.pt").is_file()
            else f"{path}: cannot be written: {error.strerror or error}"
        ) from None


def save_config(run_dir: Path, config: Config) -> None:
    """Write config.yaml.

    Raises:
        OSError: when it cannot be written.
    """
    with atomic_file(run_dir / "config.yaml") as file:
        file.write(dump_config(config).encode())


def append_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Add one line of JSON, flushed to the disk.

    Raises:
        OSError: when it cannot be written.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(metrics) + "\n")
        file.flush()
        os.fsync(file.fileno())


def keep_metrics_until(path: Path, epoch: int) -> None:
    """Drop the lines of later epochs, and a torn line: their epochs are run again.

    A line is on the disk before the checkpoint that ends its epoch, so none of an earlier one is missing.

    Raises:
        OSError: when it cannot be read or written.
    """
    before = path.read_bytes() if path.exists() else b""
    kept = b"".join(line + b"\n" for line in before.split(b"\n") if _epoch_of(line) <= epoch)
    if kept != before:
        with atomic_file(path) as file:
            file.write(kept)


def _epoch_of(line: bytes) -> float:
    """Of a line of metrics; infinite where it is none."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _check_own_files(path: Path) -> None:
    """Refuse links and pipes in the place of files that are written: a link leads out of the directory."""
    for name in (LOCK_NAME, "metrics.jsonl"):
        file = path / name
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise RunError(f"{file}: is a link or no file, and would be written; put a copy in its place")


def _check_unused(path: Path) -> None:
    if _foreign_files(path):
        raise RunError(
            f"{path}: the run directory is not empty; choose another, or continue it with"
            f" `bncli train --resume {shlex.quote(str(path))}`"
        )


def _foreign_files(path: Path) -> list[str]:
    """Everything but what a run leaves that was killed before it had a config.yaml."""
    return [
        entry.name
        for entry in path.iterdir()
        if entry.name != LOCK_NAME and not _LEFTOVER.fullmatch(entry.name)
    ]


def _remove_leftovers(path: Path) -> None:
    for entry in path.iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            entry.unlink(missing_ok=True)
