"""Benchmarks that stay with the project: every speed claim is a ratio measured in one run."""

from bncli.bench.training_step import TrainingStepBench, bench_training_step

__all__ = ["TrainingStepBench", "bench_training_step"]
