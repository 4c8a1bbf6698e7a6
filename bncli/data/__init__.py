"""Data sets: uint8 images (N, 3, H, W) with labels (N,), their augmentation and their batches."""

from bncli.data.augment import augment, check_augmentation
from bncli.data.dataset import Dataset, Progress, Split
from bncli.data.digest import digest_dataset
from bncli.data.load import load_dataset
from bncli.data.loader import (
    BatchPlan,
    micro_batches,
    num_micro_batches,
    sequential_batches,
    training_batches,
)
from bncli.data.normalization import Normalization, measure_normalization
from bncli.data.sample import sample_batches

__all__ = [
    "BatchPlan",
    "Dataset",
    "Normalization",
    "Progress",
    "Split",
    "augment",
    "check_augmentation",
    "digest_dataset",
    "load_dataset",
    "measure_normalization",
    "micro_batches",
    "num_micro_batches",
    "sample_batches",
    "sequential_batches",
    "training_batches",
]
