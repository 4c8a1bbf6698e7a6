"""Which output of a network is which class, from a file as people have it.

    tench                       a name a line, in the order of the outputs
    ["tench", "goldfish"]       JSON: the same
    {"tench": 0}                JSON: names with their indices
    {"0": "tench"}              JSON: indices with their names
    {"0": ["n01440764", "tench"]}   the same with several names of one class, such as ImageNet's

The names of folders may be a part of them: a network for a thousand classes can be evaluated on ten.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bncli.data.dataset import Dataset
from bncli.data.iterable import IterableSplit
from bncli.data.streamed import StreamedSplit
from bncli.data.user_path import user_path
from bncli.errors import DataError
from bncli.indexed import NO_LABEL, Indexed, InMemory
from bncli.wording import list_names

_MAX_BYTES = 16 << 20
_MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class ClassOrder:
    """The classes of a network, in the order of its outputs."""

    source: str  # the file
    names: tuple[str, ...]
    index_of: dict[str, int]  # by every name

    def indices_of(self, folders: Sequence[str]) -> list[int]:
        """The index of each class of a data set.

        Raises:
            DataError: one is not among them, or two are the same class.
        """
        unknown = [name for name in folders if name not in self.index_of]
        if unknown:
            near = difflib.get_close_matches(unknown[0], self.index_of, n=3, cutoff=0.6)
            hint = f"; the nearest to {unknown[0]}: {', '.join(near)}" if near else ""
            raise DataError(f"data.classes: {self.source} does not name {list_names(unknown, 5)}{hint}")
        found: dict[int, str] = {}
        for name in folders:
            index = self.index_of[name]
            if index in found:
                raise DataError(
                    f"data.classes: {self.source}: {found[index]} and {name} are both class {index}"
                )
            found[index] = name
        return list(found)

    def applied_to(self, dataset: Dataset) -> Dataset:
        """The data set with the labels and the class names of the network.

        Raises:
            DataError: its classes have no names, or others.
        """
        folders = dataset.class_names
        if not folders or folders == tuple(map(str, range(len(folders)))):
            raise DataError(f"data.classes: the classes of {dataset.name} have no names; leave it out")
        # the last one is for NO_LABEL, which is -1
        new_labels = torch.tensor([*self.indices_of(folders), NO_LABEL])
        train = _relabelled(dataset.train, new_labels)
        test = train if dataset.test is dataset.train else _relabelled(dataset.test, new_labels)
        return replace(dataset, train=train, test=test, class_names=self.names)


def _relabelled(split: Indexed, new_labels: Tensor) -> Indexed:
    if isinstance(split, StreamedSplit | IterableSplit):
        return split.relabelled(new_labels)
    assert isinstance(split, InMemory)
    return split if split.labels is None else replace(split, labels=new_labels[split.labels])


def read_class_order(path: str) -> ClassOrder:
    """Read such a file.

    Raises:
        DataError: it cannot be read, or is none; says where.
    """
    try:
        with user_path(path, "data.classes").open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise DataError(f"data.classes: {path}: cannot be read: {reason}") from None
    if len(content) > _MAX_BYTES:
        raise DataError(f"data.classes: {path}: larger than {_MAX_BYTES >> 20} MiB: no list of classes")
    try:
        classes = _classes(text)
        index_of: dict[str, int] = {}
        for index, names in enumerate(classes):
            for name in names:
                # ImageNet has two cranes and two maillots; its folders have names of their own
                if name in index_of and len(names) == 1:
                    raise DataError(f"{name} stands for {index_of[name]} and for {index}")
                index_of.setdefault(name, index)
    except DataError as error:
        raise DataError(f"data.classes: {path}: {error}") from None
    return ClassOrder(path, tuple(", ".join(names) for names in classes), index_of)


def _classes(text: str) -> list[list[str]]:
    """The names of each class, in order."""
    if not text.lstrip().startswith(("{", "[")):
        lines = [line.strip() for line in text.splitlines()]
        return _in_order({index: [line] for index, line in enumerate(line for line in lines if line)})
    try:
        found = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise DataError("nested too deep") from None
    except ValueError as error:
        raise DataError(f"no JSON: {error}") from None
    if isinstance(found, list):
        return _in_order({index: _names(one) for index, one in enumerate(found)})
    by_index: dict[int, list[str]] = {}
    for key, value in found.items():
        index, names = (value, [key]) if type(value) is int else (_index(key), _names(value))
        if index in by_index:
            raise DataError(f"{by_index[index][0]} and {names[0]} are both class {index}")
        by_index[index] = names
    return _in_order(by_index)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{repeated!r} stands twice")
    return found


def _index(key: str) -> int:
    if not key.isdecimal():
        raise DataError(f"expected names with indices, or indices with names, found {key[:40]!r}")
    return int(key)


def _names(value: object) -> list[str]:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"expected a name or a list of names, found {repr(value)[:40]}")
    return [str(name) for name in names]


def _in_order(by_index: dict[int, list[str]]) -> list[list[str]]:
    if not by_index:
        raise DataError("it names no class")
    if len(by_index) > _MAX_CLASSES:
        raise DataError(f"more than {_MAX_CLASSES:,} classes")
    for index, names in by_index.items():
        if not 0 <= index < len(by_index):
            raise DataError(
                f"{names[0]} has the index {index}, but the {len(by_index):,} classes have 0 to"
                f" {len(by_index) - 1:,}"
            )
    return [by_index[index] for index in range(len(by_index))]
