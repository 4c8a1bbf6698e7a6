"""One copy of a data set for all processes of a machine, in memory that they share.

The first process of each machine loads; the others map what it has loaded. The memory has no name in any
folder, so nothing stays behind, however the processes end. Only Linux has such memory; elsewhere, and where
images are read from files that are mapped anyway, each process loads after the first has.
"""

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bncli.data import Dataset, Split
from bncli.distributed import Processes

_ALIGNED = 64  # bytes


@dataclass(frozen=True)
class _Place:
    """Where a loaded data set lies."""

    path: str  # of the memory, which its process holds open
    size: int  # bytes
    tensors: tuple[tuple[int, tuple[int, ...], torch.dtype], ...]  # offset, shape, type
    name: str
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def load_once(load: Callable[[], Dataset], processes: Processes, *, in_memory: bool) -> Dataset:
    """What `load` returns, which the first process of each machine calls before the others.

    `in_memory`: whether it returns images that it has put into memory of its own.
    """
    launch = processes.launch
    dataset = load() if launch.local_rank == 0 else None
    place = None
    if dataset is not None and in_memory and hasattr(os, "memfd_create"):
        dataset, place = _share(dataset)
    processes.wait_for_all()  # to prepare a data set may take longer than an exchange
    places = processes.gather_values(place)
    place = places[launch.rank - launch.local_rank]  # of the first process on this machine
    if dataset is None:
        dataset = load() if place is None else _mapped(place)
    processes.gather_values(None)  # the memory is open in all processes that use it
    return dataset


def _share(dataset: Dataset) -> tuple[Dataset, _Place | None]:
    tensors = _tensors_of(dataset)
    if tensors is None:
        return dataset, None
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    handle = os.memfd_create("bncli-data")
    os.ftruncate(handle, size)
    laid_out = [
        (offset, tuple(tensor.shape), tensor.dtype) for offset, tensor in zip(offsets, tensors, strict=True)
    ]
    place = _Place(
        f"/proc/{os.getpid()}/fd/{handle}",
        size,
        tuple(laid_out),
        dataset.name,
        dataset.class_names,
        dataset.notes,
    )
    shared = _mapped(place)
    for own, copy in zip(tensors, _tensors_of(shared) or [], strict=True):
        copy.copy_(own)
    return shared, place


def _tensors_of(dataset: Dataset) -> list[Tensor] | None:
    """All that it holds; None where it is not in memory."""
    train, test = dataset.train, dataset.test
    if not isinstance(train, Split) or not isinstance(test, Split):
        return None
    splits = [train] if test is train else [train, test]
    return [tensor for split in splits for tensor in (split.images, split.labels)]


def _mapped(place: _Place) -> Dataset:
    handle = os.open(place.path, os.O_RDWR)
    try:
        memory = mmap.mmap(handle, place.size)
    finally:
        os.close(handle)  # the memory stays as long as it is mapped
    found = [
        torch.frombuffer(memory, dtype=dtype, count=torch.Size(shape).numel(), offset=offset).view(shape)
        for offset, shape, dtype in place.tensors
    ]
    train = Split(*found[:2])
    test = Split(*found[2:]) if found[2:] else train
    return Dataset(place.name, train, test, place.class_names, place.notes)
