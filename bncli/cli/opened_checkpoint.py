"""What commands begin with: a checkpoint's network and its data set, or the configuration of a timed run.

Of the places that a checkpoint records only some are followed; what is said about the rest is here too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.messages import print_note
from bncli.errors import DataError

if TYPE_CHECKING:
    from torch.nn import Module

    from bncli.checkpoints import Checkpoint
    from bncli.config import Config, DataConfig
    from bncli.data import Dataset, Progress
    from bncli.data.recorded_root import DataRecord
    from bncli.recorded_config import FollowedConfig
    from bncli.runtime import Runtime

_SHOWN = 200  # characters of a path or an address


@dataclass(frozen=True)
class Unfollowed:
    """The places that a file names and that are not followed; false where there are none."""

    root: str | None  # with the reason
    others: tuple[str, ...]
    cache: str | None

    def __bool__(self) -> bool:
        """Whether there is anything to say."""
        return bool(self.root or self.others or self.cache)

    @property
    def matters(self) -> bool:
        """Whether there is where data were found all the same."""
        return bool(self.root or self.cache)

    def of(self, path: Path) -> str:
        """One sentence, which names the file."""
        named = ", ".join([*filter(None, [self.root]), *self.others, *filter(None, [self.cache])])
        return (
            f"{path} names {named}: not used, because a file may come from anybody; --set KEY=VALUE uses it"
        )


def followed_data(
    followed: "FollowedConfig", record: "Callable[[], DataRecord]", progress: "Progress | None"
) -> "tuple[DataConfig, Unfollowed]":
    """The data section to load, and what is not followed of the recorded one.

    `record` gives the digest and the classes that the checkpoint records; it is asked where they are needed.
    """
    from bncli.data.recorded_root import check_recorded_root

    data, root, reason = followed.config.data, followed.recorded_root, None
    if root is not None:
        there = data.model_copy(update={"root": root})  # with the cache that is the user's own
        try:
            check_recorded_root(there, record, progress)
            data = there
        except DataError as error:
            reason = f"data.root={_shown(root)} ({error})"
    others = dict(followed.unfollowed_places())
    cache = others.pop("data.cache", None)
    return data, Unfollowed(
        reason,
        tuple(f"{key}={_shown(value)}" for key, value in others.items()),
        None if cache is None else f"data.cache={_shown(cache)}",
    )


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


@dataclass(frozen=True)
class Subject:
    """A checkpoint, and its network as the configuration and the overrides want it computed."""

    path: Path
    checkpoint: "Checkpoint"
    followed: "FollowedConfig"
    runtime: "Runtime"
    model: "Module"

    @property
    def config(self) -> "Config":
        """What is followed of the checkpoint's configuration, and the overrides."""
        return self.followed.config


def open_subject(
    path: Path, overrides: list[str] | None, *, command: str, batch_invariant: bool = False
) -> Subject:
    """Read a checkpoint and place its network; `command` is a key of `overrides.EFFECTIVE`.

    Raises CheckpointError, ConfigError or DeviceError.
    """
    from bncli.checkpoints import load_checkpoint, load_model
    from bncli.cli.messages import note_emulation
    from bncli.cli.overrides import has_effect
    from bncli.determinism import FixedShape
    from bncli.recorded_config import follow_config
    from bncli.runtime import resolve_runtime

    checkpoint = load_checkpoint(path)
    followed = follow_config(checkpoint.config, overrides, source=str(path))
    for key, note in followed.notes.items():
        if has_effect(key, command):
            print_note(note)
    runtime = resolve_runtime(followed.config.runtime)
    note_emulation(runtime)
    network = runtime.place_model(load_model(checkpoint, source=str(path)))
    model = FixedShape(network) if batch_invariant else network
    return Subject(path, checkpoint, followed, runtime, model)


def load_subject_data(subject: Subject) -> "Dataset":
    """The data set that the network was trained on, or that the overrides name; checked to fit the network.

    Raises DataError.
    """
    from bncli.cli.progress import ProgressReporter
    from bncli.data import load_dataset

    checkpoint = subject.checkpoint
    with ProgressReporter() as progress:
        data, unfollowed = followed_data(
            subject.followed, lambda: (checkpoint.data_digest, checkpoint.class_names), progress
        )
        try:
            dataset = load_dataset(data, progress=progress, may_download=False)
        except DataError as error:
            if unfollowed:
                raise DataError(f"{error}; {unfollowed.of(subject.path)}") from None
            raise
    if unfollowed.matters:
        print_note(unfollowed.of(subject.path))
    _check_dataset(checkpoint, dataset)
    return dataset


def open_config(path: Path, overrides: list[str] | None) -> "Config":
    """Read the configuration of a run that is to be timed: a file, or a built-in one by its name.

    Raises ConfigError or DeviceError.
    """
    from bncli.cli.messages import note_emulation
    from bncli.config_file import load_config
    from bncli.runtime import resolve_runtime

    config = load_config(path, overrides)
    note_emulation(resolve_runtime(config.runtime))
    return config


def _check_dataset(checkpoint: "Checkpoint", dataset: "Dataset") -> None:
    """Raise DataError unless classes and image size are those that the network was trained on."""
    height, width = dataset.test.images.shape[2:]
    if height != checkpoint.image_size or width != checkpoint.image_size:
        side = checkpoint.image_size
        raise DataError(
            f"{dataset.name}: its images are {height}x{width} pixels, but the checkpoint was trained on"
            f" {side}x{side}; for image folders set data.image_size={side}"
        )
    if dataset.class_names != checkpoint.class_names:
        raise DataError(
            f"{dataset.name}: its classes are {', '.join(dataset.class_names)}, but the checkpoint was"
            f" trained on {', '.join(checkpoint.class_names)}"
        )
