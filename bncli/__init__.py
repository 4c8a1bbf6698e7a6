"""bncli: train, evaluate and inspect networks with BatchNorm, on the command line and as a library.

The names below are imported when they are first used, so that `import bncli` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bncli.checkpoint import Checkpoint, load_checkpoint, load_model
    from bncli.config import Config
    from bncli.config_file import load_config
    from bncli.data import load_dataset
    from bncli.errors import BncliError
    from bncli.evaluation import (
        FixedShape,
        certify,
        check_determinism,
        evaluate,
        fold_batch_norm,
        measure_gap,
        optimize_for_inference,
    )
    from bncli.stats import Moments, audit, measure_population, read_running_stats, recalibrate
    from bncli.training import train

_HOMES = {
    "BncliError": "bncli.errors",
    "Checkpoint": "bncli.checkpoint",
    "Config": "bncli.config",
    "FixedShape": "bncli.evaluation",
    "audit": "bncli.stats",
    "certify": "bncli.evaluation",
    "check_determinism": "bncli.evaluation",
    "evaluate": "bncli.evaluation",
    "fold_batch_norm": "bncli.evaluation",
    "load_checkpoint": "bncli.checkpoint",
    "load_config": "bncli.config_file",
    "load_dataset": "bncli.data",
    "load_model": "bncli.checkpoint",
    "measure_gap": "bncli.evaluation",
    "Moments": "bncli.stats",
    "measure_population": "bncli.stats",
    "optimize_for_inference": "bncli.evaluation",
    "recalibrate": "bncli.stats",
    "read_running_stats": "bncli.stats",
    "train": "bncli.training",
}

__all__ = [
    "BncliError",
    "Checkpoint",
    "Config",
    "FixedShape",
    "Moments",
    "audit",
    "certify",
    "check_determinism",
    "evaluate",
    "fold_batch_norm",
    "load_checkpoint",
    "load_config",
    "load_dataset",
    "load_model",
    "measure_gap",
    "measure_population",
    "optimize_for_inference",
    "read_running_stats",
    "recalibrate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bncli' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
