"""The directory of a run: config.yaml, metrics.jsonl, last.pt, best.pt. Never overwritten."""

import contextlib
import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from bncli.atomic_file import atomic_file
from bncli.config import Config
from bncli.config_file import dump_config
from bncli.errors import RunError
from bncli.serialization import to_json


def default_run_dir(config_path: str | Path | None) -> Path:
    """runs/NAME-DATE-TIME, which does not exist yet."""
    name = Path(config_path).stem if config_path else "defaults"
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    path = Path("runs") / f"{name}-{stamp}"
    number = 2
    while path.exists():  # two runs started within one second
        path = Path("runs") / f"{name}-{stamp}-{number}"
        number += 1
    return path


def find_config(run_dir: Path) -> Path:
    """The configuration that `create_run_dir` wrote.

    Raises:
        RunError: when there is no run in the directory.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise RunError(f"{run_dir}: no run to resume (it has no config.yaml)")
    return path


def create_run_dir(path: Path, config: Config) -> None:
    """Make the directory and write the resolved configuration into it.

    Raises:
        RunError: when there is something already, or nothing can be written.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise RunError(
                f"{path}: the run directory is not empty; choose another, or continue it with"
                f" `bncli train --resume {path}`"
            )
        with atomic_file(path / "config.yaml") as file:
            file.write(dump_config(config).encode())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing below `path` into an error for the user.

    Raises:
        RunError: naming the directory and the reason.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None


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
    """Drop the lines of later epochs, and a torn last line: their epochs are run again.

    Raises:
        OSError: when it cannot be read or written.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["epoch"] <= epoch:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break
    with atomic_file(path) as file:
        file.write("".join(kept).encode())
