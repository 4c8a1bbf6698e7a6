"""CIFAR-10's batch files as published: their names, their MD5s, and how to read them.

A file's bytes are read once, one file after the other (threads would save 0.1 s, but keep what they free:
training peaked 100 MiB higher); the MD5 is that of the very bytes that are unpickled, and nothing is
unpickled before it is known to be right. torchvision's `CIFAR10` reads the same files, but importing
it loads its model zoo too.

https://www.cs.toronto.edu/~kriz/cifar.html; the MD5s are those that torchvision lists.
"""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bncli.data.dataset import Dataset, Split

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"

TRAIN = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
TEST = {"test_batch": "40351d587109b95175f43aff81a1287e"}
META = {"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"}


def read_batches(root: Path) -> Dataset | None:
    """Both splits from the batches in `root`; None where a file is missing or has another MD5.

    Raises:
        OSError, KeyError, ValueError, pickle.UnpicklingError: when a file cannot be read.
    """
    folder = root / FOLDER
    ((meta_name, meta_md5),) = META.items()
    train, test = _read_split(folder, TRAIN), _read_split(folder, TEST)
    meta = _read(folder / meta_name, meta_md5)
    if train is None or test is None or meta is None:
        return None
    return Dataset("cifar10", train, test, tuple(meta["label_names"]))


def _read_split(folder: Path, files: Mapping[str, str]) -> Split | None:
    """The batches one behind the other; None as above. One batch at a time is in memory beside the whole."""
    labels: list[int] = []
    images = np.empty((0, 3, 32, 32), np.uint8)
    for name, md5 in files.items():
        entry = _read(folder / name, md5)
        if entry is None:
            return None
        pixels = entry["data"].reshape(-1, 3, 32, 32)
        if not labels:  # all batches are of one size
            images = np.empty((len(files) * len(pixels), 3, 32, 32), np.uint8)
        images[len(labels) : len(labels) + len(pixels)] = pixels
        labels += entry["labels"]
    return Split(torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64))


def _read(path: Path, md5: str) -> dict[str, Any] | None:
    """What one file holds; None where it is missing or has another MD5."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:  # against damage, not forgery
        return None
    entry: dict[str, Any] = pickle.loads(content, encoding="latin1")
    return entry
