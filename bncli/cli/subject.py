"""What `eval` and `predict` begin with: a checkpoint's network, ready to compute in eval mode."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module

    from bncli.checkpoint import Checkpoint
    from bncli.config import Config
    from bncli.runtime import Runtime


@dataclass(frozen=True)
class Subject:
    """A checkpoint, and its network as the configuration and the overrides want it computed."""

    checkpoint: "Checkpoint"
    config: "Config"
    runtime: "Runtime"
    model: "Module"
    fixed_rows: int | None  # of --batch-invariant; None without it


def open_subject(path: Path, overrides: list[str] | None, *, batch_invariant: bool) -> Subject:
    """Read a checkpoint and place its network.

    Raises CheckpointError, ConfigError or DeviceError.
    """
    from bncli.checkpoint import load_checkpoint, load_model
    from bncli.config_file import config_from_dict
    from bncli.evaluation import FixedShape
    from bncli.runtime import resolve_runtime

    checkpoint = load_checkpoint(path)
    config = config_from_dict(checkpoint.config.model_dump(mode="json"), overrides, source=str(path))
    runtime = resolve_runtime(config.runtime)
    network = runtime.place_model(load_model(checkpoint))
    if not batch_invariant:
        return Subject(checkpoint, config, runtime, network, None)
    fixed = FixedShape(network)
    return Subject(checkpoint, config, runtime, fixed, fixed.rows)
