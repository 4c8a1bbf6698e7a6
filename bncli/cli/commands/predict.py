"""`bncli predict`: the class of single images, each answered as if it were alone."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial as partial_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bncli.cli.chosen_engine import check_engine, with_engine
from bncli.cli.help_page import SHOWN
from bncli.cli.messages import MAX_WIDTH, one_line, print_error, wrapped
from bncli.cli.named_network import named_network
from bncli.cli.opened_checkpoint import load_subject_data, open_subject
from bncli.cli.opened_export import find_export, refuse
from bncli.cli.options import (
    BatchInvariantOption,
    ComputedArgument,
    DataRootOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    KeyOption,
    LogitsOption,
    ModelArgOption,
    ModelOption,
    NormalizationOption,
    PartialOption,
    SetOption,
)
from bncli.cli.overrides import effective_overrides
from bncli.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from bncli.cli.named_network import NamedNetwork
    from bncli.cli.opened_checkpoint import Subject
    from bncli.config import DataConfig
    from bncli.data import Dataset
    from bncli.data.decode import Fit
    from bncli.export.engines import Array
    from bncli.export.exported_file import ExportedFile

STDIN = "-"


def predict_images(
    checkpoint: ComputedArgument,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...", help="PNG, JPEG or WebP files, folders of them, or - for an image on stdin."
        ),
    ],
    top: Annotated[
        int,
        typer.Option(min=1, metavar="K", help="Show the K most probable classes.", rich_help_panel=SHOWN),
    ] = 1,
    batch_invariant: BatchInvariantOption = False,
    model: ModelOption = None,
    model_args: ModelArgOption = None,
    key: KeyOption = None,
    partial: PartialOption = None,
    normalization: NormalizationOption = None,
    logits: LogitsOption = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    engine: EngineOption = None,
    data_root: DataRootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Name the class of each image, and its probability.

    Each image is computed alone, so its answer does not depend on the others. Exit code 2 if one cannot be
    read as an image; the others are answered all the same.

    Examples:
    bncli predict runs/first/last.pt photo.png
    bncli predict runs/first/last.pt images/ --top 3
    """
    exported = find_export(checkpoint)
    if exported is not None:
        given = {"--model": model, "--model-arg": model_args, "--key": key, "--partial": partial}
        given |= {"--normalization": normalization, "--logits": logits, "--data-root": data_root}
        refuse(checkpoint, given)
        refuse(checkpoint, {"--device": device}, "it is computed on the CPU")
        refuse(checkpoint, {"--engine": engine}, "it has its engine")
        best_of, described = _exported_answers(exported, overrides, top, batch_invariant=batch_invariant)
    else:
        named = named_network(model, model_args, key, partial, normalization, logits)
        subject = _opened(
            checkpoint, named, overrides, device, data_root, engine, batch_invariant=batch_invariant
        )
        check_engine(subject)
        classes = _classes(subject)
        subject = with_engine(subject, partial_of(_random_image, classes.fit.image_size))
        best_of = partial_of(_best_classes, subject, classes, top)
        described = subject.describe_network() | {"runtime": subject.describe_runtime()}
    answers: list[dict[str, Any]] = []
    all_answered = True
    for name in images:
        try:
            for source in _sources(name):
                all_answered &= _answer(best_of, source, top, answers, as_json=as_json)
        except DataError as error:  # a folder that cannot be listed
            print_error(str(error))
            all_answered = False
    if as_json:
        from bncli.cli.tables.table import print_json

        runtime = described.pop("runtime")
        document = {"checkpoint": str(checkpoint), **described, "batch_invariant": batch_invariant}
        print_json({**document, "predictions": answers, "runtime": runtime})
    return 0 if all_answered else 2


def _opened(
    checkpoint: Path,
    named: "NamedNetwork | None",
    overrides: list[str] | None,
    device: str | None,
    data_root: str | None,
    engine: str | None,
    *,
    batch_invariant: bool,
) -> "Subject":
    if named is None and data_root is not None:
        raise ConfigError("--data-root", ["the checkpoint tells the classes; it goes with --model"])
    command = "predict" if named is None else "predict --model"
    overrides = effective_overrides(command, overrides, device=device, data_root=data_root, engine=engine)
    return open_subject(
        checkpoint, overrides, command="predict", batch_invariant=batch_invariant, named=named
    )


Best = Callable[[bytes], list[dict[str, Any]]]  # the content of an image file to its most probable classes


def _exported_answers(
    exported: "ExportedFile", overrides: list[str] | None, top: int, *, batch_invariant: bool
) -> tuple[Best, dict[str, Any]]:
    """Answers of an engine. PyTorch, which takes long to import, is imported for its own files alone."""
    import numpy as np

    from bncli.data.decode import Fit, read_pixels
    from bncli.export.open_engine import open_engine

    threads = _threads(overrides) if overrides else None
    record = exported.known
    if not record.image_size or not record.class_names:
        raise CheckpointError(f"{exported.path}: it does not tell classes of square images apart")
    engine = open_engine(exported, threads)
    fit = Fit(record.image_size, record.resize, record.interpolation)
    rows = _fixed_rows() if batch_invariant else 1

    def best_of(content: bytes) -> list[dict[str, Any]]:
        images: Array = np.repeat(read_pixels(content, fit)[None], rows, axis=0)
        if record.pixels == "float32":
            images = images.astype(np.float32) / np.float32(255)
        scores = engine(images)[0].astype(np.float64)  # (num_classes,)
        if np.isnan(scores).any():
            raise DataError("the network answers NaN; look for it in its weights and running statistics")
        with np.errstate(under="ignore"):
            powers = np.exp(scores - scores.max())
        probabilities = powers / powers.sum()
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [
            {"class": record.class_names[label], "probability": float(probabilities[label])}
            for label in order
        ]

    runtime = {"device": "cpu", "precision": record.precision, "engine": engine.description}
    return best_of, {"runtime": runtime}


def _threads(overrides: list[str]) -> int | None:
    from bncli.config_file import config_from_dict

    overrides = effective_overrides("predict with an exported file", overrides)
    return config_from_dict({}, overrides, source="--set").runtime.threads


def _fixed_rows() -> int:
    from bncli.determinism.fixed_shape import DEFAULT_ROWS

    return DEFAULT_ROWS


@dataclass(frozen=True)
class _Classes:
    """What the network tells apart, and in images of which size."""

    names: tuple[str, ...]
    fit: "Fit"


def _classes(subject: "Subject") -> _Classes:
    """As the checkpoint records them, or those of the data set that the command line names."""
    if subject.own is not None:
        data = subject.own.config.data
        return _Classes(subject.own.class_names, _fit(data, subject.own.image_size))
    dataset = _with_names_alone(subject) or load_subject_data(subject.with_streamed_data())
    return _Classes(dataset.class_names, _fit(subject.config.data, dataset.test.image_shape[-1]))


def _with_names_alone(subject: "Subject") -> "Dataset | None":
    """A data set of black images, whose class names need no image; None where more is asked of it."""
    import torch

    from bncli.cli.named_network import MEASURED, fit_to_data
    from bncli.config import ImageFolderConfig
    from bncli.data import Dataset
    from bncli.data.class_order import read_class_order
    from bncli.data.imagefolder import TRAIN, class_names, find_splits
    from bncli.data.user_path import user_path
    from bncli.determinism.fixed_shape import without_fixed_shape
    from bncli.indexed import InMemory

    data = subject.config.data
    if subject.named is None or not isinstance(data, ImageFolderConfig):
        return None
    named = subject.named[0]
    if (named.normalization or named.default_normalization) == MEASURED:
        return None
    if data.classes is not None:
        names = read_class_order(data.classes).names
    else:
        root, _ = find_splits(user_path(data.root, "data.root"), only_train=True)
        names = class_names(root / TRAIN)
    black = InMemory(torch.zeros((2, 3, data.image_size, data.image_size), dtype=torch.uint8), None)
    network = without_fixed_shape(subject.model)
    return fit_to_data(
        network, named, Dataset("imagefolder", black, black, names), subject.runtime, subject.path
    )


def _fit(data: "DataConfig", image_size: int) -> "Fit":
    """How images become squares, as those of the data set did; its size is that of the network."""
    from bncli.config import ImageFolderConfig
    from bncli.data.decode import Fit
    from bncli.data.imagefolder import fit_of

    if not isinstance(data, ImageFolderConfig):
        return Fit(image_size)
    return replace(fit_of(data), image_size=image_size)


def _random_image(size: int) -> "Tensor":
    """(1, 3, size, size)"""
    import torch

    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=random)


def _sources(name: str) -> Iterator[str]:
    """The image itself, or those of a folder."""
    if name == STDIN or not Path(name).is_dir():
        yield name
        return
    from bncli.data.imagefolder import list_images

    yield from list_images(Path(name))


def _answer(
    best_of: Best,
    source: str,
    top: int,
    answers: list[dict[str, Any]],
    *,
    as_json: bool,
) -> bool:
    """Answer for one image, at once on stdout or into `answers`; False, with a message, if it is none."""
    try:
        best = best_of(_content(source))
    except DataError as error:
        print_error(f"{source}: {error}")
        return False
    if as_json:
        answers.append({"image": source, **best[0], "top": best})
    else:
        found = ", ".join(f"{one_line(str(item['class']))} {item['probability']:.1%}" for item in best)
        lines = [f"{one_line(source)}: {found}"]
        if top > 1 and len(lines[0]) > MAX_WIDTH:  # a path stays whole, so that it can be copied
            lines = [f"{one_line(source)}:", *wrapped(found, MAX_WIDTH, first="  ")]
        print("\n".join(lines), flush=True)
    return True


def _content(source: str) -> bytes:
    from bncli.data.decode import MAX_FILE_BYTES, check_size, read_file

    if source != STDIN:
        return read_file(Path(source))
    content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    check_size(content)
    return content


def _best_classes(subject: "Subject", classes: "_Classes", top: int, content: bytes) -> list[dict[str, Any]]:
    from bncli.data.decode import read_image
    from bncli.evaluation import predict

    image = subject.runtime.place(read_image(content, classes.fit)[None])
    with subject.runtime.autocast():
        (found,) = predict(subject.model, image, top=top)
    return [{"class": classes.names[item.label], "probability": item.probability} for item in found]
