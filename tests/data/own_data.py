"""Data sets of a user's own, made by factories of many kinds: what tests name as FILE:NAME."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

NUM_CLASSES = 3


def pixels(number: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)


class Pictures(Dataset[tuple[Image.Image, int]]):
    """PIL images with labels."""

    def __init__(self, train: bool = True, count: int = 12, ragged: bool = False) -> None:
        self.start, self.count, self.ragged = (0 if train else 1000), count, ragged

    def __len__(self) -> int:
        return self.count if self.start == 0 else 6

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        print("a data set that talks")
        side = 9 if self.ragged and number == 4 else 8
        return Image.fromarray(pixels(self.start + number, side)), number % NUM_CLASSES


class Named(Pictures):
    classes = ("cat", "dog", "eel")


class Floats(Dataset[dict[str, Any]]):
    """Images that are normalised already, in dicts."""

    def __init__(self, split: str) -> None:
        if split not in ("train", "val"):
            raise ValueError("no such split")
        self.inner = Pictures(train=split == "train")

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, number: int) -> dict[str, Any]:
        image = torch.from_numpy(pixels(self.inner.start + number)).permute(2, 0, 1).double()
        return {"pixel_values": (image - 100) / 50, "labels": torch.tensor(number % NUM_CLASSES)}


class Stream(IterableDataset[tuple[Tensor, int]]):
    """Images one after the other."""

    def __init__(self, count: int = 40) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for number in range(self.count):
            yield torch.from_numpy(pixels(number)).permute(2, 0, 1), number % NUM_CLASSES


class Endless(Stream):
    """The same again and again."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        while True:
            yield from super().__iter__()


def loader(train: bool) -> DataLoader[Any]:
    return DataLoader(Pictures(train), batch_size=5, collate_fn=list)


def plain_loader(train: bool) -> DataLoader[Any]:
    return DataLoader(Floats("train" if train else "val"), batch_size=5)


def loader_of_stream() -> DataLoader[Any]:
    return DataLoader(Stream(), batch_size=7)


def sequences(train: bool) -> list[Tensor]:
    """Without labels: (L, C) each."""
    return [torch.full((5, 2), float(number)) for number in range(10 if train else 4)]


def nothing() -> list[object]:
    return []


def empty_stream() -> Stream:
    return Stream(0)


def number() -> int:
    return 3


def generator() -> Iterator[int]:
    return iter([1])


def raising() -> Pictures:
    raise RuntimeError("no\nluck")


def needing(folder: str, train: bool) -> Pictures:
    return Pictures(train)


def bad_label() -> list[tuple[Tensor, object]]:
    return [(torch.zeros(3), 0), (torch.zeros(3), "cat")]


def huge_label() -> list[tuple[Tensor, int]]:
    return [(torch.zeros(3), 10**30)]


def real_label() -> list[tuple[Tensor, float]]:
    return [(torch.zeros(3), 0.5)]


def ragged_stream() -> Stream:
    return RaggedStream(9)


class RaggedStream(Stream):
    """The fifth has another size."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for number, (image, label) in enumerate(super().__iter__()):
            yield image[:, : 8 - (number == 4)], label


def types() -> list[tuple[Tensor, int]]:
    return [(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 4, 4, dtype=torch.uint8), 1)]


def far_label() -> "Far":
    return Far()


class Far(Named):
    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return super().__getitem__(number)[0], 7


class Unlabelled(Pictures):
    def __getitem__(self, number: int) -> Image.Image:  # type: ignore[override]
        return super().__getitem__(number)[0]


class TooFar(Pictures):
    """Nothing says how many classes there are."""

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return super().__getitem__(number)[0], 7


def bad_input() -> list[tuple[str, int]]:
    return [("a.png", 0)]


class Breaking(Pictures):
    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        if number == 5:
            raise KeyError("five")
        return super().__getitem__(number)
