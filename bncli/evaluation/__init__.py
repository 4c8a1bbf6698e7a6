"""What a classifier does in eval mode: how well, how reliably, and against batch statistics."""

from bncli.evaluation.augmented import AugmentedEvaluation, evaluate_augmented
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
from bncli.evaluation.folded import fold_batch_norm
from bncli.evaluation.gap import Gap, LayerGap, measure_gap
from bncli.evaluation.inference import INFERENCE_ROWS, InferenceNetwork, optimize_for_inference
from bncli.evaluation.outcomes import (
    Outcomes,
    PairedDifference,
    Score,
    compare_outcomes,
    measure_outcomes,
)
from bncli.evaluation.predict import ClassProbability, predict
from bncli.evaluation.sweep import SweepPoint, sweep_batch_sizes

__all__ = [
    "BATCH_SIZES",
    "DEFAULT_ROWS",
    "INFERENCE_ROWS",
    "AugmentedEvaluation",
    "BatchSizeCheck",
    "Certificate",
    "Claim",
    "Claims",
    "ClassProbability",
    "Evaluation",
    "FixedShape",
    "Gap",
    "InferenceNetwork",
    "LayerGap",
    "Outcomes",
    "PairedDifference",
    "Score",
    "SweepPoint",
    "TrainModeContrast",
    "certify",
    "check_determinism",
    "compare_outcomes",
    "evaluate",
    "evaluate_augmented",
    "fold_batch_norm",
    "measure_gap",
    "measure_outcomes",
    "optimize_for_inference",
    "predict",
    "sweep_batch_sizes",
]
