"""Checkpoints: one file from which every command but `train` works."""

from bncli.checkpoint.any_file import OpenCheckpoint, open_checkpoint
from bncli.checkpoint.digest import file_sha256
from bncli.checkpoint.format import Checkpoint, load_checkpoint, load_model, save_checkpoint
from bncli.checkpoint.integrity import Integrity, check_integrity
from bncli.checkpoint.locate import Candidate
from bncli.checkpoint.stored_tensor import StoredTensor

__all__ = [
    "Candidate",
    "Checkpoint",
    "Integrity",
    "OpenCheckpoint",
    "StoredTensor",
    "check_integrity",
    "file_sha256",
    "load_checkpoint",
    "load_model",
    "open_checkpoint",
    "save_checkpoint",
]
