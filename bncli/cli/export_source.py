"""What `bncli export` exports: a checkpoint's network, what it takes, and images to prove it with."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import bncli
from bncli.cli.messages import print_note
from bncli.cli.opened_checkpoint import Subject, load_subject_data, open_subject, records_network
from bncli.errors import BncliError, ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from bncli.batchnorm import Finding
    from bncli.cli.named_network import NamedNetwork
    from bncli.data import Dataset
    from bncli.export import ExportRecord
    from bncli.export.record import Pixels, Precision

# the network is compared as it is: plain float32 on the CPU, which every engine has
_PLAIN = ["runtime.device=cpu", "runtime.precision=float32", "runtime.memory_format=contiguous"]
_PLACES = ("root", "url", "archive", "cache", "classes")  # of this machine


@dataclass(frozen=True)
class ExportSource:
    """A network that is ready to be exported."""

    subject: Subject
    model: "Module"  # in eval mode, takes raw images
    image_shape: tuple[int, ...]
    is_pixels: bool  # uint8 images, or numbers as they are
    normalization: dict[str, Any] | None
    class_names: tuple[str, ...]
    dataset: "Dataset | None"  # None: there are no images at hand
    data_digest: str | None

    def findings(self) -> "tuple[Finding, ...] | None":
        """What is wrong with the statistics, where the file tells more than the network: bncli's own does."""
        if self.subject.own is None:
            return None
        from bncli.audit import audit

        return audit(self.subject.path)

    def record(self, pixels: "Pixels", precision: "Precision") -> "ExportRecord":
        """What the file will say of itself, but for its BatchNorm."""
        from bncli.checkpoints import file_sha256
        from bncli.export import ExportRecord

        subject, data = self.subject, self.subject.config.data
        config = subject.config.model_dump(mode="json")
        config["data"] = {key: value for key, value in config["data"].items() if key not in _PLACES}
        if not config["data"].get("arguments", True):  # of the checkpoint they are not followed, but told
            config["data"]["arguments"] = getattr(subject.followed.recorded.data, "arguments", {})
        config = _without_folders(config)
        config["runtime"] = {"eval_batch_size": subject.config.runtime.eval_batch_size}
        named = subject.named
        if named is not None:
            del config["model"], config["train"], config["augment"]
        sha256 = "" if "://" in str(subject.path) or not subject.path.is_file() else file_sha256(subject.path)
        return ExportRecord(
            bncli=bncli.__version__,
            source={"file": subject.path.name, "sha256": sha256, "epoch": subject.epoch},
            network=_without_folders(subject.config.model.name if named is None else named[0].name),
            pixels=pixels if self.is_pixels else "float32",
            image_shape=self.image_shape,
            normalization=self.normalization,
            resize=getattr(data, "resize", None),
            interpolation=getattr(data, "interpolation", "bilinear"),
            class_names=self.class_names,
            precision=precision,
            folded=(),
            kept=(),
            statistics=self._statistics(),
            config=config,
            data_digest=self.data_digest,
        )

    def _statistics(self) -> dict[str, Any]:
        """How the running statistics were made, as far as it is known."""
        from bncli.batchnorm import batch_norm_layers
        from bncli.serialization import to_plain

        own = self.subject.own
        averaged = {} if own is None or own.averaged is None else to_plain(own.averaged)
        sources = {"average_of": averaged["sources"]} if "sources" in averaged else {}
        if own is not None and own.recalibration is not None:
            measured: dict[str, Any] = to_plain(own.recalibration)
            return measured | sources
        if sources:  # without images: in one of the ways of `bncli average`
            return {"method": averaged.get("statistics"), **sources}
        counted = [layer.num_batches_tracked for _, layer in batch_norm_layers(self.model)]
        counts = [int(count) for count in counted if count is not None]
        return {
            "method": "moving averages of training" if own is not None else "as in the source",
            "momentum": sorted({layer.momentum or 0.0 for _, layer in batch_norm_layers(self.model)}),
            "num_batches_tracked": max(counts, default=None),
        }


def _without_folders(value: Any) -> Any:
    """A configuration whose absolute paths are their last parts alone, as in net.py:Net: the file travels."""
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    if isinstance(value, str):
        for path in (PurePosixPath(value), PureWindowsPath(value)):
            if path.is_absolute() or value.startswith("~"):
                return path.name
    return value


def open_export_source(path: Path, overrides: list[str], named: "NamedNetwork | None") -> ExportSource:
    """Read the checkpoint. Raises CheckpointError, ConfigError, and DataError where images are named."""
    if named is None or records_network(path):
        return _own(path, overrides, named)
    from bncli.config_file import override_values

    data = override_values(overrides).get("data")
    if isinstance(data, dict) and {"root", "name"} & data.keys():
        return _with_data(open_subject(path, [*overrides, *_PLAIN], command="export", named=named))
    subject = open_subject(
        path, ["data.name=imagefolder", *overrides, *_PLAIN], command="export", named=named
    )
    return _without_data(subject)


def _own(path: Path, overrides: list[str], repeated: "NamedNetwork | None") -> ExportSource:
    subject = open_subject(path, [*overrides, *_PLAIN], command="export", named=repeated)
    own = subject.checkpoint
    dataset = None
    try:
        dataset = load_subject_data(subject)
    except DataError as error:
        if subject.followed.is_named("data.root"):
            raise
        print_note(f"random images prove the file: {error}")
    return ExportSource(
        subject=subject,
        model=subject.model,
        image_shape=(3, own.image_size, own.image_size),
        is_pixels=True,
        normalization={"mean": own.mean, "std": own.std},
        class_names=own.class_names,
        dataset=dataset,
        data_digest=own.data_digest,
    )


def _with_data(subject: Subject) -> ExportSource:
    import torch

    dataset = load_subject_data(subject.with_streamed_data(), classifies=False)
    names = _class_names(subject, dataset.test.image_shape, dataset.test.dtype, dataset.class_names)
    return ExportSource(
        subject=subject,
        model=subject.model,
        image_shape=tuple(dataset.test.image_shape),
        is_pixels=dataset.test.dtype == torch.uint8,
        normalization=_normalization(subject.model),
        class_names=names,
        dataset=dataset,
        data_digest=None,
    )


def _without_data(subject: Subject) -> ExportSource:
    """Of a network whose library, or the command line, says how images enter it."""
    import torch

    from bncli.cli.named_network import HOW_NORMALIZED, MEASURED, fit_to_data
    from bncli.config import ImageFolderConfig
    from bncli.data import Dataset
    from bncli.data.class_order import read_class_order
    from bncli.indexed import InMemory

    assert subject.named is not None
    named, data = subject.named[0], subject.config.data
    assert isinstance(data, ImageFolderConfig)
    if (named.normalization or named.default_normalization) == MEASURED:
        raise ConfigError("bncli export --model", [HOW_NORMALIZED])
    shape = (3, data.image_size, data.image_size)
    black = InMemory(torch.zeros((2, *shape), dtype=torch.uint8), None)
    names = read_class_order(data.classes).names if data.classes is not None else ()
    dataset = Dataset("imagefolder", black, black, names)
    fit_to_data(subject.model, named, dataset, subject.runtime, subject.path, classifies=False)
    return ExportSource(
        subject=subject,
        model=subject.model,
        image_shape=shape,
        is_pixels=True,
        normalization=_normalization(subject.model),
        class_names=_class_names(subject, shape, torch.uint8, names),
        dataset=None,
        data_digest=None,
    )


def _normalization(model: "Module") -> dict[str, Any] | None:
    from bncli.models.normalized import input_normalization

    found = input_normalization(model)
    return None if found is None else dict(zip(("mean", "std"), found, strict=True))


def _class_names(
    subject: Subject, shape: tuple[int, ...], dtype: Any, names: tuple[str, ...]
) -> tuple[str, ...]:
    """The names, if the network tells so many classes apart; numbers where it tells others apart."""
    import torch

    from bncli.models.picked_output import describe_outputs

    with torch.no_grad():
        outputs = subject.model(torch.zeros((2, *shape), dtype=dtype))
    if not isinstance(outputs, torch.Tensor):
        raise BncliError(
            f"an exported file has one output, the network returns {describe_outputs(outputs)}; --logits NAME"
            " takes one of them"
        )
    if outputs.ndim != 2:
        return ()
    if len(names) == outputs.shape[1]:
        return names
    if names:
        print_note(
            f"the network has {outputs.shape[1]:,} classes, the images have {len(names):,}: they are"
            " numbered, not named (data.classes names a file with all of them, in order)"
        )
    return tuple(map(str, range(outputs.shape[1])))


def proving_images(source: ExportSource, num_images: int, folder: Path | None) -> "tuple[Tensor, str]":
    """Images (N, ...) of the folder, else of the test split, else random ones; and which they are.

    Raises DataError.
    """
    import torch

    from bncli.indexed import pick
    from bncli.sample import random_order
    from bncli.wording import plural

    generator = torch.Generator().manual_seed(0)
    if folder is not None:
        images = _images_of(source, folder, num_images)
        return images, f"{plural(len(images), 'image')} of {folder}"
    if source.dataset is not None:
        test = source.dataset.test
        if test.can_shuffle:
            chosen = random_order(len(test))[:num_images].sort().values
            images = pick(test, chosen)
        else:
            images = pick(test, range(min(num_images, len(test))))
        return images, f"{plural(len(images), 'test image')} of {source.dataset.name}"
    shape = (num_images, *source.image_shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return images, f"{plural(num_images, 'random image')}"


def _images_of(source: ExportSource, folder: Path, num_images: int) -> "Tensor":
    import torch

    from bncli.data.decode import Fit, read_file, read_image
    from bncli.data.imagefolder import list_images

    if not source.is_pixels or len(source.image_shape) != 3:
        raise ConfigError("--images", ["the network takes no images; leave it out"])
    data = source.subject.config.data
    fit = Fit(
        source.image_shape[-1], getattr(data, "resize", None), getattr(data, "interpolation", "bilinear")
    )
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    images = []
    for name in list_images(folder)[:num_images]:
        try:
            images.append(read_image(read_file(Path(name)), fit))
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    return torch.stack(images)
