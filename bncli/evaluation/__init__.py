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

__all__ = [
    "BATCH_SIZES",
    "DEFAULT_ROWS",
    "BatchSizeCheck",
    "Certificate",
    "Claim",
    "Claims",
    "Evaluation",
    "FixedShape",
    "TrainModeContrast",
    "certify",
    "check_determinism",
    "evaluate",
]
