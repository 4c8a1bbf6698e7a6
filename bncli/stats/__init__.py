"""BatchNorm's running statistics, for any `nn.Module` or state dict: read, judge, follow, protect."""

from bncli.stats.audit import Finding, audit
from bncli.stats.compare import Comparison, Contents, LayerComparison, ReadableTensor, compare
from bncli.stats.divergence import Divergence, DivergenceSummary, diverge, summarize_divergence
from bncli.stats.fixed_point import LayerConsistency, verify_fixed_point
from bncli.stats.layers import Hyperparameters, LayerStats, batch_norm_layers, read_running_stats
from bncli.stats.modes import (
    batch_statistics_mode,
    buffers_digest,
    eval_mode,
    preserved_buffers,
    train_mode,
)
from bncli.stats.moments import Moments
from bncli.stats.population import LayerPopulation, Population, measure_population
from bncli.stats.recalibrate import LayerChange, Recalibration, apply_population, recalibrate
from bncli.stats.rules import RULES, Rule, Threshold, find_rule
from bncli.stats.selection import SkippedLayer
from bncli.stats.summary import Summary, summarize
from bncli.stats.tracking import EpochStatistics, LayerEpoch

__all__ = [
    "RULES",
    "Comparison",
    "Contents",
    "Divergence",
    "DivergenceSummary",
    "EpochStatistics",
    "Finding",
    "Hyperparameters",
    "LayerChange",
    "LayerComparison",
    "LayerConsistency",
    "LayerEpoch",
    "LayerPopulation",
    "LayerStats",
    "Moments",
    "Population",
    "ReadableTensor",
    "Recalibration",
    "Rule",
    "SkippedLayer",
    "Summary",
    "Threshold",
    "apply_population",
    "audit",
    "batch_norm_layers",
    "batch_statistics_mode",
    "buffers_digest",
    "compare",
    "diverge",
    "eval_mode",
    "find_rule",
    "measure_population",
    "preserved_buffers",
    "read_running_stats",
    "recalibrate",
    "summarize",
    "summarize_divergence",
    "train_mode",
    "verify_fixed_point",
]
