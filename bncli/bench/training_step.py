"""bncli's training step against the same network in a plain PyTorch loop, in turns.

The plain loop is what a tutorial shows: float32, contiguous tensors, a `DataLoader` over
`torchvision.datasets`-style samples with torchvision's transforms, SGD. Both sides start from the same
weights, take batches of the same size, and are timed with loading and augmentation included. The plain loop
runs in a process of its own, because what bncli sets for its whole process would speed it up as well.

`matrix_gflops` says how fast this machine multiplies matrices: the yardstick for a share of its peak.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bncli.bench.convolutions import ConvolutionSpeed, bench_convolutions
from bncli.bench.plain_loop import plain_process
from bncli.config import Config
from bncli.data import Progress as DataProgress
from bncli.errors import ConfigError
from bncli.hardware import describe_machine
from bncli.models.convnet import measure_layers
from bncli.runtime import synchronize
from bncli.training import prepare
from bncli.training.loop import training_step
from bncli.training.run import Run


def matrix_gflops(device: torch.device, precision: torch.dtype, size: int = 2048) -> float:
    """The best of several products of square matrices, in 1e9 floating-point operations a second."""
    matrix = torch.randn(size, size, device=device).to(precision)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


@dataclass(frozen=True)
class TrainingStepBench:
    """What was measured. Rates are medians over the rounds."""

    num_rounds: int
    steps_per_round: int
    batch_size: int
    images_per_second: float
    plain_images_per_second: float
    ratio_to_plain: float  # median of the ratios of neighbouring rounds
    ratio_min: float
    ratio_max: float
    gflops_per_second: float  # of bncli's step, counted as three forward passes
    share_of_peak: float  # of the matrix-product rate below
    peak_gflops_per_second: float  # a product of 2048x2048 matrices in the same precision
    plain_workers: int  # of the plain loop's DataLoader
    runtime: dict[str, Any]
    machine: dict[str, Any]
    convolutions: tuple[ConvolutionSpeed, ...] | None = None  # None: not asked for


def bench_training_step(
    config: Config,
    *,
    num_rounds: int = 5,
    steps_per_round: int = 4,
    plain_workers: int = 0,
    with_convolutions: bool = False,
    data_progress: DataProgress | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> TrainingStepBench:
    """Time both loops in turns, after one round each to warm up; and each convolution, if asked for.

    Raises:
        BncliError: when the configuration cannot be trained here.
    """
    # both loops take whole images
    augment = config.augment.at_full_size()
    config = config.model_copy(update={"augment": augment})
    setup = prepare(config, progress=data_progress)
    if setup.plan.num_steps < steps_per_round:
        raise ConfigError(
            "train", [f"train.batch_size: an epoch has {setup.plan.num_steps} steps; use smaller batches"]
        )
    run = Run.start(setup)
    ours = _bncli_rounds(run, steps_per_round)
    rates: list[tuple[float, float]] = []
    with plain_process(config, steps_per_round, plain_workers) as plain_round:
        report("one round of both loops, untimed, to warm up")
        next(ours), plain_round()
        for number in range(num_rounds):
            rates.append((next(ours), plain_round()))
            report(
                f"round {number + 1} of {num_rounds}: bncli {rates[-1][0]:,.0f} images/s,"
                f" plain {rates[-1][1]:,.0f} images/s"
            )
    peak = matrix_gflops(setup.runtime.device, setup.runtime.precision)
    images_per_second = statistics.median(rate for rate, _ in rates)
    _, flops = measure_layers(setup.model, setup.image_shape)
    convolutions = None
    if with_convolutions:
        report("the products of each convolution, and of matrices of the same sizes")
        convolutions = bench_convolutions(
            setup, run.by_patches, peak=peak, seconds_per_image=1 / images_per_second
        )
    gflops = 3 * flops * images_per_second / 1e9
    ratios = [fast / slow for fast, slow in rates]
    return TrainingStepBench(
        num_rounds=num_rounds,
        steps_per_round=steps_per_round,
        batch_size=config.train.batch_size,
        images_per_second=images_per_second,
        plain_images_per_second=statistics.median(rate for _, rate in rates),
        ratio_to_plain=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        gflops_per_second=gflops,
        share_of_peak=gflops / peak,
        peak_gflops_per_second=peak,
        plain_workers=plain_workers,
        runtime=run.describe_runtime(),
        machine=describe_machine(),
        convolutions=convolutions,
    )


def _bncli_rounds(run: Run, num_steps: int) -> Iterator[float]:
    """Images per second of `num_steps` steps of bncli's own loop, again and again."""
    run.model.train()
    while True:
        num_images = 0
        start = time.perf_counter()
        for _, (images, labels) in zip(range(num_steps), run.batches(), strict=False):
            training_step(run, images, labels)
            num_images += len(labels)
        synchronize(run.setup.runtime.device)
        yield num_images / (time.perf_counter() - start)
        run.epoch += 1
        run.step = 0
