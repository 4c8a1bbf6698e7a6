"""A data set by its name: one of torchvision's, or what a function of the user's own returns.

    torchvision:SVHN             any data set of torchvision.datasets
    package.module:factory       a class or function that can be imported
    path/to/file.py:factory      the same in a file

Each is called twice, with train=True and train=False, or with split="train" and split="test", as its
parameters say; without such a parameter its one data set stands for both splits. It returns a
`torch.utils.data.Dataset`, of the map or the iterable kind, a DataLoader, or a list. A sample is
(input, label), an input alone, or a dict with both under their usual names (see `bncli.batches`). PIL images
become uint8 pixels (3, H, W). Tensors stay as they are: uint8 is pixels, floating point is what the network
takes. Labels are whole numbers from 0; -1 is none.

What fits into memory is kept there; the rest is read whenever it is used. Nothing is downloaded, unless an
argument says so. A name must come from the user, never from a checkpoint.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import redirect_stdout
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bncli.batches import find_input, find_labels
from bncli.config import NamedDataConfig
from bncli.data.dataset import Dataset, Progress, numbered_classes, require_known
from bncli.data.decode import Fit, to_pixels
from bncli.data.iterable import IterableSplit
from bncli.data.memory import SPARE, available_memory
from bncli.data.streamed import Sample, StreamedSplit, check_alike
from bncli.data.user_path import user_path
from bncli.errors import DataError
from bncli.foreign_code import (
    UnusableError,
    check_arguments,
    errors_of_others,
    find_foreign,
    nearest,
    running_foreign_code,
)
from bncli.indexed import NO_LABEL, Indexed, InMemory, in_order

FORMS = "torchvision:NAME, package.module:NAME or path/to/file.py:NAME"
MAX_KEPT = 4_000_000_000  # bytes of inputs
_BATCH = 256  # samples that are read at a time where all are kept
_MAX_LABEL = 9_999_999  # each class up to the highest gets a name
_MAX_COUNTED = 10_000_000  # samples of an iterable, which may never end
# what `split` may be, in the order in which it is tried
_SPLITS = {True: ("train", "trainval"), False: ("test", "val", "valid")}


def load_named_data(
    config: NamedDataConfig, progress: Progress | None = None, *, only_train: bool = False
) -> Dataset:
    """Call what the name names, and read what fits into memory.

    With `only_train` it is called for the training split alone, which is then the test split too.

    Raises:
        DataError: there is no such data set, what makes it raises or returns something else, or its samples
            cannot be used.
    """
    if config.resize is not None and config.image_size is None:
        raise DataError("data.resize: goes with data.image_size, the size of the middle that is cut out")
    try:
        with running_foreign_code(config.name):
            factory, arguments = _find(config)
            made = [_call(factory, arguments, is_training=True)]
            made.append(made[0] if only_train else _call(factory, arguments, is_training=False))
    except UnusableError as error:
        # what torchvision says of it is for Python
        missing = "download=True" in str(error) and "download" not in config.arguments
        fix = "; here that is --set data.arguments.download=true" if missing else ""
        raise DataError(f"data {config.name}: {error}{fix}") from None
    notes = []
    if made[1] is None:
        made[1] = made[0]
        notes.append(f"{config.name} has no argument train or split: the test samples are the training's")
    train = _split(made[0], config, "training", progress)
    is_same = only_train or (made[1] is made[0] and config.num_test in (None, config.num_train))
    test = train if is_same else _split(made[1], config, "test", progress)
    if not (train.can_shuffle and test.can_shuffle):
        notes.append(f"{config.name} gives samples in one order only: a sample of them is its beginning")
    names = _class_names(made[0], train, test)
    for split in (train, test):
        if isinstance(split, InMemory):  # of others the labels may not be known yet
            require_known(split, names, config.name)
    return Dataset(config.name, train, test, names, tuple(notes))


def _find(config: NamedDataConfig) -> tuple[Callable[..., object], dict[str, Any]]:
    """What makes it, and its arguments but for the split."""
    kind, colon, rest = config.name.partition(":")
    arguments: dict[str, Any] = dict(config.arguments)
    where, _, attribute = config.name.rpartition(":")
    if kind == "torchvision" and colon:
        factory = _in_torchvision(rest)
    elif not where or not attribute:
        raise UnusableError(f"expected {FORMS}")
    else:
        factory = find_foreign(where, attribute)
    if not callable(factory):
        return (lambda: factory), arguments  # a data set that is there already
    root = "data" if config.root is None and kind == "torchvision" else config.root
    if root is not None and (kind != "torchvision" or "root" in _parameters(factory)):
        arguments.setdefault("root", str(user_path(root, "data.root")))
    return factory, arguments


def _in_torchvision(name: str) -> Callable[..., object]:
    from bncli.torchvision_compat import import_torchvision

    datasets = import_torchvision().datasets
    known = [
        key
        for key, value in vars(datasets).items()
        if isinstance(value, type) and issubclass(value, datasets.VisionDataset) and key != "VisionDataset"
    ]
    if name not in known:
        raise UnusableError(f"torchvision has no such data set{nearest(name, known)}")
    return getattr(datasets, name)  # type: ignore[no-any-return]


def _parameters(factory: Callable[..., object]) -> set[str]:
    try:
        return set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # of some functions written in C
        return set()


def _call(factory: Callable[..., object], arguments: dict[str, Any], *, is_training: bool) -> object:
    """One split; None for the test split where there is only one."""
    parameters = _parameters(factory)
    chosen: Sequence[dict[str, Any]] = [{}]
    if "train" in parameters:
        chosen = [{"train": is_training}]
    elif "split" in parameters and "split" not in arguments:
        chosen = [{"split": name} for name in _SPLITS[is_training]]
    elif not is_training:
        return None
    for number, choice in enumerate(chosen):
        check_arguments(factory, arguments | choice, "--set data.arguments.{}=VALUE", "data.arguments")
        with errors_of_others("making the data set"):
            try:
                return _checked(factory(**arguments, **choice))
            except ValueError:  # an unknown name of a split
                if number == len(chosen) - 1:
                    raise
    raise AssertionError("the last choice returns or raises")


def _checked(made: object) -> object:
    """Raise UnusableError for what is no data set."""
    is_map = hasattr(made, "__getitem__") and hasattr(made, "__len__")
    if isinstance(made, str | bytes | dict | Tensor | type) or not (is_map or hasattr(made, "__iter__")):
        expected = "a torch.utils.data.Dataset or a DataLoader"
        raise UnusableError(f"expected that it returns {expected}, found {type(made).__name__}")
    if hasattr(made, "__next__"):
        raise UnusableError(
            f"it returns a {type(made).__name__}, which can be read only once; return a Dataset or DataLoader"
        )
    return made


def _split(made: object, config: NamedDataConfig, which: str, progress: Progress | None) -> Indexed:
    """The split of what was made, in memory where it fits."""
    from torch.utils.data import DataLoader, IterableDataset
    from torch.utils.data.dataloader import default_collate

    workers, fit = config.workers, None
    limit = config.num_train if which == "training" else config.num_test
    if config.image_size is not None:
        fit = Fit(config.image_size, config.resize, config.interpolation)
    in_batches = False
    if isinstance(made, DataLoader):
        inside = made.dataset
        if made.collate_fn is default_collate and not isinstance(inside, IterableDataset):
            workers = made.num_workers if workers is None else workers
            made = inside
        else:
            in_batches = True
    reader = _Reader(config.name, made, fit)
    if in_batches or isinstance(made, IterableDataset) or not hasattr(made, "__len__"):
        return _read_through(reader, config, which, limit, progress, in_batches=in_batches)
    assert isinstance(made, Sized)
    if len(made) == 0:
        raise DataError(f"data {config.name}: its {which} split has no samples")
    size = len(made) if limit is None else min(limit, len(made))
    streamed = StreamedSplit(reader, size, name=config.name, num_workers=workers)
    first, _ = reader(0)
    needed = first.nbytes * size
    if config.stream is True or (config.stream == "auto" and not _fits(needed)):
        return streamed
    images = torch.empty((len(streamed), *first.shape), dtype=streamed.dtype)
    labels = torch.empty(len(streamed), dtype=torch.int64)
    for numbers, (some, their_labels) in zip(
        in_order(len(streamed), _BATCH), streamed.batches_of(in_order(len(streamed), _BATCH)), strict=True
    ):
        images[numbers.start : numbers.stop], labels[numbers.start : numbers.stop] = some, their_labels
        if progress is not None:
            progress(f"read the {which} split", numbers.stop, len(streamed))
    return InMemory(images, _labels(labels))


def _fits(needed: int) -> bool:
    available = available_memory()
    return needed <= MAX_KEPT and (available is None or needed + SPARE <= available)


def _labels(labels: Tensor) -> Tensor | None:
    return None if bool((labels == NO_LABEL).all()) else labels


def _read_through(
    reader: "_Reader",
    config: NamedDataConfig,
    which: str,
    limit: int | None,
    progress: Progress | None,
    *,
    in_batches: bool,
) -> Indexed:
    """Samples that come in one order: kept as long as they fit, and counted."""

    def begin() -> Iterator[Sample]:
        return islice(reader.samples(in_batches=in_batches), limit)

    key = "data.num_train" if which == "training" else "data.num_test"
    hint = f" to its end (--set {key}=N reads fewer)" if limit is None else ""
    kept: list[Any] | None = None if config.stream is True else []
    labels: list[int] = []
    num_bytes = 0
    for image, label in begin():
        if limit is None and len(labels) == _MAX_COUNTED:
            more = f"its {which} split has no length, and yields more than {_MAX_COUNTED:,} samples"
            raise DataError(f"data {config.name}: {more}; --set {key}=N says how many to read")
        labels.append(label)
        num_bytes += image.nbytes
        if kept is not None:
            kept.append(image)
            if config.stream == "auto" and len(labels) % _BATCH == 0 and not _fits(num_bytes):
                kept = None
        if progress is not None and len(labels) % _BATCH == 0:
            progress(f"read the {which} split{hint}", len(labels), limit)
    if not labels:
        raise DataError(f"data {config.name}: its {which} split yields nothing")
    known = _labels(torch.tensor(labels))
    if kept is None:
        return IterableSplit(begin, len(labels), known, config.name)
    check_alike(kept[0], kept, range(len(kept)), config.name)
    return InMemory(torch.from_numpy(np.stack(kept)), known)


class _Reader:
    """Makes samples of a foreign data set what bncli computes with; errors name the sample."""

    def __init__(self, name: str, source: Any, fit: Fit | None) -> None:
        self._name, self._source, self._fit = name, source, fit

    def __call__(self, number: int) -> Sample:
        """One sample of a map."""
        with redirect_stdout(sys.stderr):
            try:
                with errors_of_others(f"sample {number:,}"):
                    return self._sample(number, self._source[number])
            except UnusableError as error:
                raise DataError(f"data {self._name}: {error}") from None

    def samples(self, *, in_batches: bool) -> Iterator[Sample]:
        """All samples of an iterable, in one pass."""
        number = 0
        try:
            with errors_of_others("reading it"):
                found = iter(self._source)
            while True:
                with redirect_stdout(sys.stderr), errors_of_others(f"sample {number:,}"):
                    try:
                        batch = next(found)
                    except StopIteration:
                        return
                    some = list(self._rows(number, batch)) if in_batches else [self._sample(number, batch)]
                yield from some
                number += len(some)
        except UnusableError as error:
            raise DataError(f"data {self._name}: {error}") from None

    def _rows(self, start: int, batch: object) -> Iterator[Sample]:
        inputs, labels = find_input(batch), find_labels(batch)
        if not isinstance(inputs, Tensor) or inputs.ndim == 0:
            raise UnusableError(f"a batch begins with a {type(inputs).__name__}, expected a tensor (N, ...)")
        for row, values in enumerate(inputs):
            yield self._sample(start + row, (values, None if labels is None else labels[row]))  # type: ignore[index]

    def _sample(self, number: int, sample: object) -> Sample:
        try:
            return self._input(find_input(sample)), _label(find_labels(sample))
        except UnusableError as error:
            raise UnusableError(f"sample {number:,}: {error}") from None

    def _input(self, found: object) -> Any:
        if isinstance(found, Image.Image):
            return to_pixels(found, self._fit)
        if isinstance(found, np.ndarray):
            found = torch.from_numpy(found)
        if not isinstance(found, Tensor):
            raise UnusableError(
                f"its input is of type {type(found).__name__}, expected a tensor, an array or a PIL image"
            )
        if found.dtype.is_floating_point:
            found = found.float()
        return found.detach().cpu().contiguous().numpy()


def _label(found: object) -> int:
    if found is None:
        return NO_LABEL
    if isinstance(found, Tensor | np.ndarray) and found.ndim == 0:
        found = found.item()
    if not isinstance(found, int | np.integer) or not NO_LABEL <= found <= _MAX_LABEL:
        shown = f"{found!r}" if isinstance(found, int | float | str) else type(found).__name__
        raise UnusableError(f"its label is {shown[:60]}, expected a whole number from 0 to {_MAX_LABEL:,}")
    return int(found)


def _class_names(made: object, train: Indexed, test: Indexed) -> tuple[str, ...]:
    """What the data set calls its classes, else their numbers; () where nobody knows without reading it."""
    for _ in range(10):  # of a Subset of a Subset, say
        classes = getattr(made, "classes", None)
        if isinstance(classes, list | tuple) and classes:
            # ImageNet's have several names each
            return tuple(", ".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in classes)
        made = getattr(made, "dataset", None)
    if isinstance(train, InMemory) and isinstance(test, InMemory):
        return numbered_classes(train, test)
    return ()
