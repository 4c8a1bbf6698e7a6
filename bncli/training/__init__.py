"""Training: from a configuration to a run directory with checkpoints."""

from bncli.training.describe import SetupDescription, describe_setup
from bncli.training.loop import EpochDone, Started, StepDone, TrainResult, train
from bncli.training.recalibrated import (
    RecalibratedCheckpoint,
    RecalibrationMethod,
    recalibrate_checkpoint,
    training_sample,
    verify_checkpoint,
)
from bncli.training.setup import Setup, prepare

__all__ = [
    "EpochDone",
    "RecalibratedCheckpoint",
    "RecalibrationMethod",
    "Setup",
    "SetupDescription",
    "Started",
    "StepDone",
    "TrainResult",
    "describe_setup",
    "prepare",
    "recalibrate_checkpoint",
    "train",
    "training_sample",
    "verify_checkpoint",
]
