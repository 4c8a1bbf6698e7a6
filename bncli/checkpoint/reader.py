"""Reading files of `torch.save` without trusting them."""

import hashlib
import pickle
import stat
from pathlib import Path
from typing import Any

import torch

from bncli.errors import CheckpointError

ZIP_START = b"PK\x03\x04"


def read_torch_file(path: str | Path) -> Any:
    """What `torch.save` wrote, on the CPU, without executing code from the file.

    Raises:
        CheckpointError: on anything that is no such file, or holds more than tensors and plain values.
    """
    path = Path(path)
    is_zip = first_bytes(path) == ZIP_START  # how torch.save writes since version 1.6
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


def file_sha256(path: str | Path) -> str:
    """The digest of a file's bytes, hexadecimal. Raises OSError when it cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_bytes(path: Path) -> bytes:
    """The first four bytes of a file that may be a checkpoint.

    Raises:
        CheckpointError: it is empty, cannot be read, or is no file (a pipe could be waited for without end).
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: a directory, not a checkpoint{_checkpoints_in(path)}")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: a pipe or a device, not a checkpoint; copy it into a file")
        with path.open("rb") as file:
            start = file.read(4)
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read: {reason}") from None
    if not start:
        raise CheckpointError(f"{path}: an empty file, not a checkpoint")
    return start


def _checkpoints_in(directory: Path) -> str:
    """The hint for somebody who gave the run directory instead of a file in it."""
    names = [name for name in ("last.pt", "best.pt") if (directory / name).is_file()]
    return f"; did you mean {directory / names[0]}?" if names else ""
