"""Benchmarks that stay with the project: every speed claim is a ratio measured in one run."""

from bncli.bench.population import PopulationBench, bench_population
from bncli.bench.training_step import TrainingStepBench, bench_training_step

__all__ = ["PopulationBench", "TrainingStepBench", "bench_population", "bench_training_step"]
