"""CIFAR-10's batch files as published: their names, their MD5s, and how to read them.

A file's bytes are read once; the MD5 is that of the very bytes that are unpickled, and nothing is unpickled
before it is known to be right. torchvision's `CIFAR10` reads the same files, but importing it loads its model
zoo and the compiler: a second, and 110 MiB, before a run that needs neither.

https://www.cs.toronto.edu/~kriz/cifar.html; the MD5s are those that torchvision lists.
"""

import hashlib
import os
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
    # hashing lets go of Python's lock, so files are read side by side; two at most are in memory at once
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        parts = [pool.submit(_read, folder, files) for files in (TRAIN, TEST, META)]
        train, test, meta = (part.result() for part in parts)
    if train is None or test is None or meta is None:
        return None
    names = tuple(meta[0]["label_names"])
    return Dataset("cifar10", _split(train), _split(test), names)


def md5_of(content: bytes) -> str:
    """In hexadecimal; against damage, not against forgery."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _read(folder: Path, files: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """What the files hold; None where one is missing or has another MD5."""
    entries = []
    for name, md5 in files.items():
        path = folder / name
        if not path.is_file():
            return None
        content = path.read_bytes()
        if md5_of(content) != md5:
            return None
        entries.append(pickle.loads(content, encoding="latin1"))
    return entries


def _split(entries: list[dict[str, Any]]) -> Split:
    """The batches one behind the other; they are taken from the list, so that no two copies are kept."""
    labels = [label for entry in entries for label in entry["labels"]]
    images = np.empty((len(labels), 3, 32, 32), np.uint8)
    place = 0
    for entry in entries:
        pixels = entry.pop("data").reshape(-1, 3, 32, 32)
        images[place : place + len(pixels)] = pixels
        place += len(pixels)
    if place != len(labels):
        raise ValueError(f"{place} images, but {len(labels)} labels")
    return Split(torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64))
