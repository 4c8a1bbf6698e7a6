"""Benchmarks that stay with the project: every speed claim is a ratio measured in one run."""

from bncli.bench.population import PopulationBench, bench_population
from bncli.bench.repair import RepairBench, bench_repair
from bncli.bench.training_step import TrainingStepBench, bench_training_step

__all__ = [
    "PopulationBench",
    "RepairBench",
    "TrainingStepBench",
    "bench_population",
    "bench_repair",
    "bench_training_step",
]
