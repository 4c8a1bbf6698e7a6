"""Checkpoints: one file from which every command but `train` works."""

from bncli.checkpoint.files import read_torch_file, write_atomically
from bncli.checkpoint.format import Checkpoint, load_checkpoint, load_model, save_checkpoint

__all__ = [
    "Checkpoint",
    "load_checkpoint",
    "load_model",
    "read_torch_file",
    "save_checkpoint",
    "write_atomically",
]
