"""What commands begin with where the file is one of `bncli export`: its engine as the network."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bncli.errors import ConfigError

if TYPE_CHECKING:
    from bncli.cli.opened_checkpoint import Subject
    from bncli.export.exported_file import ExportedFile

# an engine computes as it was exported; what PyTorch does around it is copying
_PLAIN = ["runtime.device=cpu", "runtime.precision=float32", "runtime.memory_format=contiguous"]


def find_export(path: Path) -> "ExportedFile | None":
    """The file, if an engine computes it; None for a checkpoint, and for what cannot be read.

    Raises CheckpointError for one that another program wrote.
    """
    from bncli.export.exported_file import exported_file

    found = exported_file(path)
    if found is not None:
        found.known  # noqa: B018  (raises)
    return found


def refuse(path: Path, options: Mapping[str, object], why: str = "it records that itself") -> None:
    """Raise ConfigError for an option that is given and means nothing for an exported file."""
    for option, value in options.items():
        if value:
            raise ConfigError(option, [f"{path} is an exported file: {why}; leave it out"])


def open_exported(
    exported: "ExportedFile", overrides: list[str], *, batch_invariant: bool = False
) -> "Subject":
    """Open the engine, and follow what the file records of its data.

    Raises CheckpointError or ConfigError.
    """
    from bncli.cli.opened_checkpoint import Subject
    from bncli.config_file import config_from_dict
    from bncli.determinism import FixedShape
    from bncli.export import EngineNetwork, open_engine
    from bncli.recorded_config import follow_config
    from bncli.runtime import resolve_runtime

    record, source = exported.known, str(exported.path)
    recorded = config_from_dict(dict(record.config), source=f"{source} (its configuration)")
    followed = follow_config(recorded, [*overrides, *_PLAIN], source=source)
    runtime = resolve_runtime(followed.config.runtime)
    network = EngineNetwork.of(exported, open_engine(exported, runtime.threads))
    model = FixedShape(network) if batch_invariant else network
    return Subject(exported.path, followed, runtime, model, None, exported=record)
