"""What a classifier does in eval mode: how well (evaluate) and how reliably (determinism)."""

from bncli.evaluation.determinism import (
    BatchSizeCheck,
    Determinism,
    TrainModeContrast,
    check_determinism,
)
from bncli.evaluation.evaluate import Evaluation, evaluate

__all__ = [
    "BatchSizeCheck",
    "Determinism",
    "Evaluation",
    "TrainModeContrast",
    "check_determinism",
    "evaluate",
]
