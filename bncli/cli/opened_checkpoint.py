"""What commands begin with: a checkpoint's network and its data set, or the configuration of a timed run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.cli.messages import print_note
from bncli.errors import DataError

if TYPE_CHECKING:
    from torch.nn import Module

    from bncli.checkpoints import Checkpoint
    from bncli.config import Config
    from bncli.data import Dataset
    from bncli.recorded_config import FollowedConfig
    from bncli.runtime import Runtime


@dataclass(frozen=True)
class Subject:
    """A checkpoint, and its network as the configuration and the overrides want it computed."""

    path: Path
    checkpoint: "Checkpoint"
    followed: "FollowedConfig"
    runtime: "Runtime"
    model: "Module"
    fixed_rows: int | None  # of --batch-invariant; None without it

    @property
    def config(self) -> "Config":
        """What is followed of the checkpoint's configuration, and the overrides."""
        return self.followed.config


def open_subject(path: Path, overrides: list[str] | None, *, batch_invariant: bool) -> Subject:
    """Read a checkpoint and place its network.

    Raises CheckpointError, ConfigError or DeviceError.
    """
    from bncli.checkpoints import load_checkpoint, load_model
    from bncli.cli.messages import note_emulation
    from bncli.determinism import FixedShape
    from bncli.recorded_config import follow_config
    from bncli.runtime import resolve_runtime

    checkpoint = load_checkpoint(path)
    followed = follow_config(checkpoint.config, overrides, source=str(path))
    for note in followed.notes:
        print_note(note)
    runtime = resolve_runtime(followed.config.runtime)
    note_emulation(runtime)
    network = runtime.place_model(load_model(checkpoint))
    if not batch_invariant:
        return Subject(path, checkpoint, followed, runtime, network, None)
    fixed = FixedShape(network)
    return Subject(path, checkpoint, followed, runtime, fixed, fixed.rows)


def load_subject_data(subject: Subject) -> "Dataset":
    """The data set that the network was trained on, or that the overrides name; checked to fit the network.

    Raises DataError.
    """
    from bncli.cli.progress import ProgressReporter
    from bncli.cli.unfollowed_places import followed_data
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
    """Read the configuration of a run that is to be timed.

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
