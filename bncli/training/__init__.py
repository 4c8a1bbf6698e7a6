"""Training: from a configuration to a run directory with checkpoints."""

from bncli.training.describe import SetupDescription, describe_setup
from bncli.training.loop import EpochDone, Started, StepDone, TrainResult, train
from bncli.training.setup import Setup, prepare

__all__ = [
    "EpochDone",
    "Setup",
    "SetupDescription",
    "Started",
    "StepDone",
    "TrainResult",
    "describe_setup",
    "prepare",
    "train",
]
