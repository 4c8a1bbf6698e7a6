"""Reading files of `torch.save` without trusting them."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch

from bncli.checkpoint.byte_source import hint_for_directory
from bncli.errors import CheckpointError


def read_torch_file(path: str | Path) -> Any:
    """What `torch.save` wrote, on the CPU, without executing code from the file.

    Raises:
        CheckpointError: on anything that is no such file, or holds more than tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: a directory, not a checkpoint{hint_for_directory(path)}")
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


def file_sha256(path: str | Path) -> str:
    """The digest of a file's bytes, hexadecimal. Raises OSError when it cannot be read."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
