"""CIFAR-10's batch files as published: their names, their MD5s, and how to read them.

A file's bytes are read once; the MD5 is that of the very bytes that are unpickled, and nothing is unpickled
before it is known to be right. A second thread hashes the next files meanwhile. It allocates nothing: files
that threads read leave their memory with them, and training peaked 100 MiB higher. torchvision's `CIFAR10`
reads the same files, but importing it loads its model zoo too.

https://www.cs.toronto.edu/~kriz/cifar.html; the MD5s are those that torchvision lists.
"""

import hashlib
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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
    ((name, md5),) = META.items()
    train, test = _read_split(folder, TRAIN), _read_split(folder, TEST)
    if train is None or test is None or not (folder / name).is_file():
        return None
    meta = (folder / name).read_bytes()
    if not _has_md5(meta, md5):
        return None
    return Dataset("cifar10", train, test, tuple(pickle.loads(meta, encoding="latin1")["label_names"]))


def _read_split(folder: Path, files: Mapping[str, str]) -> Split | None:
    """The batches one behind the other; None as above."""
    if not all((folder / name).is_file() for name in files):
        return None
    contents = [(folder / name).read_bytes() for name in files]
    labels: list[int] = []
    images = np.empty((0, 3, 32, 32), np.uint8)
    with ThreadPoolExecutor(1) as pool:
        for is_right in pool.map(_has_md5, list(contents), files.values()):
            if not is_right:
                return None
            entry: dict[str, Any] = pickle.loads(contents.pop(0), encoding="latin1")
            pixels = entry["data"].reshape(-1, 3, 32, 32)
            if not labels:  # all batches are of one size
                images = np.empty((len(files) * len(pixels), 3, 32, 32), np.uint8)
            images[len(labels) : len(labels) + len(pixels)] = pixels
            labels += entry["labels"]
    return Split(torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64))


def _has_md5(content: bytes, md5: str) -> bool:
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == md5  # against damage, not forgery
