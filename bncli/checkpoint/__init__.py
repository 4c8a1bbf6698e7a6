"""Checkpoints: one file from which every command but `train` works."""

from bncli.checkpoint.format import Checkpoint, load_checkpoint, load_model, save_checkpoint
from bncli.checkpoint.integrity import Integrity, check_integrity
from bncli.checkpoint.reader import file_sha256, read_torch_file

__all__ = [
    "Checkpoint",
    "Integrity",
    "check_integrity",
    "file_sha256",
    "load_checkpoint",
    "load_model",
    "read_torch_file",
    "save_checkpoint",
]
