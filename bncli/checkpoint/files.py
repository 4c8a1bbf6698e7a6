"""Writing files so that a crash leaves the old or the new one, and reading torch files safely."""

import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from bncli.errors import CheckpointError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    File and directory are flushed to the disk before the call returns.

    Raises:
        OSError: when the file cannot be written; `path` is then what it was before.
    """
    # the leading dot and suffix keep it out of `*.pt`; the same directory makes the rename atomic
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())  # mkstemp makes files that only the owner reads
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":  # Windows cannot open a directory
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_torch_file(path: str | Path) -> Any:
    """What `torch.save` wrote, on the CPU, without executing code from the file.

    Raises:
        CheckpointError: on anything that is no such file, or holds more than tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: a directory, not a checkpoint{_checkpoints_in(path)}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not start:
        raise CheckpointError(f"{path}: an empty file, not a checkpoint")
    is_zip = start == b"PK\x03\x04"  # how torch.save writes since version 1.6
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if is_zip:
            reason = "it holds Python objects beside tensors, which bncli does not execute"
            raise CheckpointError(f"{path}: {reason}; save model.state_dict() instead") from None
        raise CheckpointError(f"{path}: not a checkpoint: no file of torch.save") from None
    except Exception as error:
        # on damaged and foreign files torch.load raises IndexError, EOFError, RuntimeError, OSError, ...
        what = "a damaged or truncated one" if is_zip else "no file of torch.save"
        raise CheckpointError(f"{path}: not a checkpoint: {what} ({type(error).__name__})") from None


def _checkpoints_in(directory: Path) -> str:
    """The hint for somebody who gave the run directory instead of a file in it."""
    names = [name for name in ("last.pt", "best.pt") if (directory / name).is_file()]
    return f"; did you mean {directory / names[0]}?" if names else ""
