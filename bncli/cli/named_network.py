"""What `--model` and its companions ask for: a network by name, and any checkpoint loaded into it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bncli.errors import BncliError, ConfigError, NoClassifierError

if TYPE_CHECKING:
    from torch import nn

    from bncli.checkpoints import LoadedWeights
    from bncli.config import Config, DataConfig
    from bncli.data import Dataset
    from bncli.models.preset import Preset
    from bncli.runtime import Runtime

CONVNET = "convnet"  # bncli's own, which its checkpoints describe
MEASURED = "measured"
HOW_NORMALIZED = (
    "how are pixels normalised? Nothing says it; give --normalization NAME, or --data-root FOLDER to measure"
    " it on the training images"
)


@dataclass(frozen=True)
class NamedNetwork:
    """A network as the command line names it."""

    name: str
    arguments: dict[str, Any]
    key: str | None
    partial: tuple[str, ...] | None  # None: of a command that loads whole networks only
    normalization: str | None  # as the command line gives it
    logits: str | None
    default_normalization: str = MEASURED  # of pixels, where it gives none

    def with_preset(self, preset: "Preset | None", data: "DataConfig") -> "NamedNetwork":
        """The same, with the normalization of the data's configuration or of the network's library.

        Raises ConfigError where the command line gives two.
        """
        given = {self.normalization, data.normalization} - {None}
        if len(given) > 1:
            found = f"it says {self.normalization}, but data.normalization says {data.normalization}"
            raise ConfigError("--normalization", [f"{found}; give one of them"])
        by_default = MEASURED if preset is None else preset.normalization
        return replace(self, normalization=next(iter(given), None), default_normalization=by_default)

    def load(self, path: Path) -> "tuple[nn.Module, LoadedWeights]":
        """The network in eval mode on the CPU with the file's tensors, and which those are.

        Raises ConfigError or CheckpointError.
        """
        from bncli.checkpoints.named import load_named

        return load_named(
            self.name,
            self.arguments,
            as_typed(path),
            key=self.key,
            partial=self.partial,
            logits=self.logits,
        )

    def check_repeats(self) -> None:
        """Refuse options that mean nothing where the name repeats what bncli's own checkpoint records.

        Raises ConfigError.
        """
        given = {
            "--key": self.key,
            "--partial": self.partial,
            "--normalization": self.normalization,
            "--logits": self.logits,
        }
        for option, value in given.items():
            if value:
                raise ConfigError(option, ["a checkpoint of `bncli train` records it; leave it out"])

    def describe(self, loaded: "LoadedWeights") -> dict[str, Any]:
        """The part of a JSON document."""
        return {
            "name": self.name,
            "arguments": self.arguments,
            "normalization": self.normalization or self.default_normalization,
            "weights": loaded.to_dict(),
        }


def named_network(
    model: str | None,
    arguments: Sequence[str] | None,
    key: str | None,
    partial: Sequence[str] | None,
    normalization: str | None,
    logits: str | None,
) -> NamedNetwork | None:
    """What the options ask for; None for a checkpoint of bncli's own.

    Raises ConfigError for options that would change nothing, and for values that cannot be read.
    """
    if model is None or model == CONVNET:
        given = {
            "--model-arg": arguments,
            "--key": key,
            "--partial": partial,
            "--normalization": normalization,
            "--logits": logits,
        }
        for option, value in given.items():
            if value:
                reason = "a checkpoint of `bncli train` describes its network itself"
                raise ConfigError(option, [f"goes with --model NAME of another network; {reason}"])
        return None
    if normalization is not None:
        from bncli.data import parse_normalization

        parse_normalization(normalization, "--normalization")
    return NamedNetwork(
        model, _parse_arguments(arguments or ()), key, tuple(partial or ()), normalization, logits
    )


def as_typed(path: Path) -> str:
    """A path, or the URL that was made one."""
    return re.sub(r"^([a-z][a-z0-9+.-]+):/+", r"\1://", str(path))


def is_address(path: Path) -> bool:
    """Whether it is a URL, which some commands read and others cannot."""
    return "://" in as_typed(path)


def _parse_arguments(items: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE read as `--set` reads it: values are YAML, dotted keys are sections."""
    from bncli.config_file import override_values

    for item in items:
        if "=" not in item or item.startswith("="):
            raise ConfigError("--model-arg", [f"expected KEY=VALUE such as num_classes=10, found {item!r}"])
    try:
        return override_values(list(items))
    except ConfigError as error:
        raise ConfigError("--model-arg", error.problems) from None


def find_data(
    overrides: list[str],
    command: str,
    preset: "Preset | None",
    normalization: str | None,
    *,
    needs_images: bool = True,
) -> list[str]:
    """The overrides, with the kind of data where only their folder is named.

    `normalization` is what --normalization says.

    Raises ConfigError where no data are named and images are needed: a foreign checkpoint does not say which
    it is of.
    """
    from bncli.config_file import override_values
    from bncli.data.cifar10_files import batch_folders
    from bncli.data.user_path import user_path

    data = override_values(overrides).get("data")
    named = data if isinstance(data, dict) else {}
    # as the owners of most networks evaluate them
    overrides = ["runtime.precision=float32", *overrides]
    if "name" in named:
        unknown = (
            command == "bncli export" and preset is None and not {"root", "normalization"} & named.keys()
        )
        also = [HOW_NORMALIZED] if unknown and normalization is None else []
        return [*_sizes(preset, named, also), *overrides] if named["name"] == "imagefolder" else overrides
    if "root" not in named and command == "bncli predict" and "classes" in named:
        return ["data.name=imagefolder", *_sizes(preset, named), *overrides]  # names are all that is asked
    if "root" not in named:
        if not needs_images:
            return overrides
        if command == "bncli predict":
            asked = "which classes"
            ways = "--set data.classes=FILE (a name a line), or data.root=FOLDER (with FOLDER/train/CLASS)"
        else:
            asked = "which images"
            ways = "--set data.root=FOLDER (images in FOLDER/{train,test}/CLASS) or --set data.name=cifar10"
        raise ConfigError(f"{command} --model", [f"{asked}? The checkpoint does not say; give {ways}"])
    root = user_path(str(named["root"]), "data.root")
    if next(batch_folders(root), None) is not None:
        return ["data.name=cifar10", *overrides]
    return ["data.name=imagefolder", *_sizes(preset, named), *overrides]


def _sizes(preset: "Preset | None", named: Mapping[str, object], also: Sequence[str] = ()) -> list[str]:
    """How the images of folders become squares, as of --set: as the network's library does it.

    Where the command line gives a size, the whole image is resized to it. Raises ConfigError where nobody
    says one: a wrong size costs accuracy, and nothing else shows it. `also` is asked for along with it.
    """
    if "image_size" in named:
        return []
    if preset is None or preset.image_size is None:
        raise ConfigError(
            "bncli export --model" if also else "data.image_size",
            [
                "images of which size does the network take? Nothing says it; --set data.image_size=N"
                " resizes them to NxN pixels, data.resize=M beside it cuts the middle out of a shorter side"
                " of M",
                *also,
            ],
        )
    return [f"data.{key}={getattr(preset, key)}" for key in ("image_size", "resize", "interpolation")]


def tell_images(config: "Config", named: NamedNetwork, *, has_preset: bool) -> None:
    """Say what was assumed of the images: a wrong guess costs accuracy, and nothing else shows it."""
    from bncli.cli.messages import print_note
    from bncli.config import ImageFolderConfig, NamedDataConfig

    data, shape = config.data, ""
    if isinstance(data, NamedDataConfig):
        return  # they may be no images: `fit_to_data` tells when it has seen one
    if isinstance(data, ImageFolderConfig):
        size = f"{data.image_size}x{data.image_size}"
        shape = f"resized to {size}, "
        if data.resize is not None:
            shape = f"middle {size} of a shorter side of {data.resize}, {data.interpolation}, "
    print_note(f"images: {shape}--normalization {named.normalization or named.default_normalization}")
    if has_preset and isinstance(data, ImageFolderConfig):
        print_note("change that with --set data.image_size=N (and data.resize=M)")


def fit_to_data(
    network: "nn.Module",
    named: NamedNetwork,
    dataset: "Dataset",
    runtime: "Runtime",
    path: Path,
    *,
    classifies: bool = True,
) -> "Dataset":
    """Let the network take the raw images, and check that it computes them and tells their classes apart.

    Returns the data set, in which classes without names are as many as the network has. Without `classifies`
    its outputs may be anything. Raises BncliError where it cannot compute them, and
    NoClassifierError where it is none, or has another number of classes.
    """
    from bncli.cli.messages import print_note
    from bncli.data import chosen_normalization
    from bncli.models import normalize_input

    text, train = named.normalization, dataset.train
    known = chosen_normalization(text, train, named.default_normalization)
    if known is None:
        shape = "x".join(map(str, train.image_shape))
        print_note(f"inputs: {shape} of {str(train.dtype).removeprefix('torch.')}, as they are")
    else:
        if (text or named.default_normalization) == MEASURED:
            rounded = "/".join(",".join(f"{x:.3f}" for x in values) for values in (known.mean, known.std))
            print_note(
                f"pixels are normalised as measured: --normalization {rounded}; imagenet or half are others"
            )
        normalize_input(network, known.mean, known.std, runtime.device)
    outputs = _check_forward(network, named, dataset, runtime)
    return _check_logits(outputs, named, dataset, path) if classifies else dataset


def _check_forward(
    network: "nn.Module", named: NamedNetwork, dataset: "Dataset", runtime: "Runtime"
) -> object:
    """What it returns for two images."""
    import torch

    from bncli.indexed import pick

    images = pick(dataset.test, range(min(2, len(dataset.test))))
    try:
        with runtime.autocast(), torch.no_grad():
            return network(runtime.place(images))
    except BncliError as error:  # of --logits
        raise BncliError(f"model {named.name}: --logits: {error}") from None
    except Exception as error:  # of the user's network
        size = "x".join(str(length) for length in images.shape[1:])
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise BncliError(f"model {named.name}: cannot compute images of {size} values: {text}") from None


def _check_logits(logits: object, named: NamedNetwork, dataset: "Dataset", path: Path) -> "Dataset":
    """Raise NoClassifierError unless it has as many columns as there are classes."""
    import torch

    from bncli.models.picked_output import describe_outputs

    num_images = min(2, len(dataset.test))
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != num_images:
        found = describe_outputs(logits)
        pick = "" if isinstance(logits, torch.Tensor) else "; --logits NAME takes one of several outputs"
        raise NoClassifierError(
            f"model {named.name}: expected logits of shape (N, classes), found {found}{pick}"
        )
    num_classes = logits.shape[1]
    names = dataset.class_names
    if names == tuple(map(str, range(len(names)))) and len(names) < num_classes:  # they are only numbers
        return replace(dataset, class_names=tuple(map(str, range(num_classes))))
    if num_classes != len(names):
        fix = (
            "data.classes names a file with all of them, in order"
            if num_classes > len(names)
            else "give images of its classes alone"
        )
        raise NoClassifierError(
            f"{path}: the network has {num_classes:,} classes, but {dataset.name} has {len(names):,}; {fix}"
        )
    return dataset
