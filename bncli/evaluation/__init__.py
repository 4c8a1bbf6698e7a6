"""What a classifier does in eval mode: how well, how reliably, and against batch statistics."""

from bncli.evaluation.certificate import (
    BATCH_SIZES,
    BatchSizeCheck,
    Certificate,
    Claims,
    TrainModeContrast,
    certify,
    check_determinism,
)
from bncli.evaluation.claim import Claim
from bncli.evaluation.evaluate import Evaluation, evaluate
from bncli.evaluation.fixed_shape import DEFAULT_ROWS, FixedShape
from bncli.evaluation.predict import ClassProbability, predict
from bncli.evaluation.sweep import SweepPoint, sweep_batch_sizes

__all__ = [
    "BATCH_SIZES",
    "DEFAULT_ROWS",
    "BatchSizeCheck",
    "Certificate",
    "Claim",
    "Claims",
    "ClassProbability",
    "Evaluation",
    "FixedShape",
    "SweepPoint",
    "TrainModeContrast",
    "certify",
    "check_determinism",
    "evaluate",
    "predict",
    "sweep_batch_sizes",
]
