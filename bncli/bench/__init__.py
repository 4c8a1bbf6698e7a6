"""Benchmarks that stay with the project: what a speed claim rests on is measured in one run."""

from bncli.bench.accuracy import AccuracyBench, bench_accuracy
from bncli.bench.evaluation import EvaluationBench, PathSpeed, Ratio, bench_evaluation
from bncli.bench.inspection import Inspection, InspectionBench, bench_inspection
from bncli.bench.population import PopulationBench, bench_population
from bncli.bench.repair import RepairBench, bench_repair
from bncli.bench.scale import ScaleBench, SizeRate, bench_scale
from bncli.bench.time_to_accuracy import SeedRun
from bncli.bench.training_step import TrainingStepBench, bench_training_step

__all__ = [
    "AccuracyBench",
    "EvaluationBench",
    "Inspection",
    "InspectionBench",
    "PathSpeed",
    "PopulationBench",
    "Ratio",
    "RepairBench",
    "ScaleBench",
    "SeedRun",
    "SizeRate",
    "TrainingStepBench",
    "bench_accuracy",
    "bench_evaluation",
    "bench_inspection",
    "bench_population",
    "bench_repair",
    "bench_scale",
    "bench_training_step",
]
