"""Evaluation by plain PyTorch, bncli and other engines, in turns: throughput, latency, changed predictions.

Ratios are taken within a round and to the first way (see `bncli.bench.ways`), so that a busy machine slows
down both. Then each way is started in processes of its own, again in turns: seconds to the first answer, and
peak of memory.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bncli.bench.alone import Alone, start_alone
from bncli.bench.network_source import NetworkSource
from bncli.bench.torch_ways import Classify
from bncli.bench.ways import BFLOAT16, FLOAT32, ONNX, OPENVINO, Load, Way, ways_of_checkpoint, ways_of_file
from bncli.export import ExportedFile
from bncli.hardware import describe_machine
from bncli.runtime import Runtime

MAX_FLIPS = 0.002  # of predictions, in what is called the fastest: as many as bfloat16 changes
_WARM_UP_CALLS = 5  # single images, untimed: another path's threads may still be spinning
# how to get what is not what the file is computed by as it is
_HINTS = {
    OPENVINO: "--engine openvino",
    ONNX: "--engine onnxruntime",
    FLOAT32: "bncli export -o NAME.xml",
    BFLOAT16: "bncli export -o NAME.xml --precision bfloat16",
}


@dataclass(frozen=True)
class Ratio:
    """Of ratios within a round, over the rounds."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class PathSpeed:
    """One way to evaluate. What was not measured, because a package is missing, is None."""

    name: str
    how: str  # precision and memory format, or what is missing
    images_per_second: float | None = None  # in large batches, median over the rounds
    throughput_ratio: Ratio | None = None  # to the first way; above 1 is faster
    throughput_ratio_to_onnx: Ratio | None = None
    latency_median_ms: float | None = None  # of one image, over all calls
    latency_p99_ms: float | None = None
    latency_ratio: Ratio | None = None  # to the first way, of the medians of a round; below 1 is faster
    latency_ratio_to_onnx: Ratio | None = None
    num_flips: int | None = None  # test images whose prediction is not that of the first way
    prediction_flips: float | None = None  # the same as a fraction
    first_answer_seconds: float | None = None  # of a process of its own, from before its start; median
    first_answer_ratio: Ratio | None = None  # to the first way; below 1 is faster
    peak_mib: float | None = None  # of resident memory, after two batches in that process; median


@dataclass(frozen=True)
class EvaluationBench:
    """What was measured."""

    paths: tuple[PathSpeed, ...]
    num_rounds: int
    batch_size: int
    batches_per_round: int
    calls_per_round: int  # with a single image
    num_starts: int  # of processes for each way
    num_test_images: int  # that flips are counted on
    onnxruntime: str | None  # what its row says of it
    runtime: dict[str, Any]
    machine: dict[str, Any]

    @property
    def verdict(self) -> str:
        """What to use here, among the ways that change hardly any prediction."""
        usable = [path for path in self.paths if (path.prediction_flips or 0) <= MAX_FLIPS]
        rates = {path.name: path.images_per_second for path in usable if path.images_per_second is not None}
        times = {path.name: path.latency_median_ms for path in usable if path.latency_median_ms is not None}
        batches, single = max(rates, key=rates.__getitem__), min(times, key=times.__getitem__)
        others = {name: None for name in (single, batches) if name != self.paths[0].name and name in _HINTS}
        how = f" ({'; '.join(f'{name}: {_HINTS[name]}' for name in others)})" if others else ""
        if batches == single:
            return f"Use {batches} here, for single images and for batches{how}."
        return f"Use {single} here for single images, and {batches} for batches{how}."


@dataclass(frozen=True)
class _Round:
    images_per_second: float
    latencies: list[float]  # ms


def bench_evaluation(
    subject: NetworkSource | ExportedFile,
    images: Tensor,
    runtime: Runtime,
    *,
    num_rounds: int = 5,
    batch_size: int = 256,
    batches_per_round: int = 2,
    calls_per_round: int = 100,
    num_starts: int = 0,
    compiles: bool = False,
    load: Load | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> EvaluationBench:
    """Time all ways on raw test images (N, ...), and compare their predictions.

    The number of threads is that of the process, for other engines as
    well. With `compiles` torch.compile is timed too: it compiles for up to a minute. `load` makes the
    network of a source where that is at hand.

    Raises CompileError where it cannot, BncliError where an engine cannot.
    """
    # Windows cannot remove a file that an engine has mapped
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if isinstance(subject, NetworkSource):
            ways = ways_of_checkpoint(
                subject, images[[0, 0]], runtime, Path(folder), compiles=compiles, load=load
            )
        else:
            ways = ways_of_file(subject, runtime.threads, compiles=compiles)
        calls = {way.name: way.classify for way in ways if way.classify is not None}
        predictions = {}
        for name, classify in calls.items():
            report(f"predictions: {name}")
            predictions[name] = _predictions(classify, images, batch_size)
        rounds = _in_turns(calls, images, num_rounds, batch_size, batches_per_round, calls_per_round, report)
        speeds = [_speed(way, rounds, predictions, ways[0].name) for way in ways]
        started = _starts(ways, tuple(images.shape[1:]), batch_size, num_starts, report)
        speeds = [_with_starts(speed, started, ways[0].name) for speed in speeds]
    return EvaluationBench(
        paths=tuple(speeds),
        num_rounds=num_rounds,
        batch_size=batch_size,
        batches_per_round=batches_per_round,
        calls_per_round=calls_per_round,
        num_starts=num_starts,
        num_test_images=len(images),
        onnxruntime=next((way.how for way in ways if way.name == ONNX and way.classify is not None), None),
        runtime=runtime.describe(),
        machine=describe_machine(),
    )


def _predictions(classify: Classify, images: Tensor, batch_size: int) -> Tensor:
    return torch.cat([classify(batch).argmax(1) for batch in images.split(batch_size)])  # (N,)


def _in_turns(
    paths: dict[str, Classify],
    images: Tensor,
    num_rounds: int,
    batch_size: int,
    num_batches: int,
    num_calls: int,
    report: Callable[[str], None],
) -> dict[str, list[_Round]]:
    """Every path in every round, after one round to warm up; every second round backwards."""
    batch = images[torch.arange(batch_size) % len(images)]
    singles = [images[[index % len(images)]] for index in range(num_calls)]
    found: dict[str, list[_Round]] = {name: [] for name in paths}
    report("one round of all paths, untimed, to warm up")
    for number in range(num_rounds + 1):
        order = list(paths) if number % 2 else list(reversed(paths))
        taken = {name: _time(paths[name], batch, num_batches, singles) for name in order}
        if number:
            for name, one in taken.items():
                found[name].append(one)
            rates = ", ".join(f"{name} {taken[name].images_per_second:,.0f}" for name in paths)
            report(f"round {number} of {num_rounds}, images/s: {rates}")
    return found


def _time(classify: Classify, batch: Tensor, num_batches: int, singles: Sequence[Tensor]) -> _Round:
    start = time.perf_counter()
    for _ in range(num_batches):
        classify(batch)
    rate = num_batches * len(batch) / (time.perf_counter() - start)
    for image in singles[:_WARM_UP_CALLS]:
        classify(image)
    latencies = []
    for image in singles:
        start = time.perf_counter()
        classify(image)
        latencies.append((time.perf_counter() - start) * 1e3)
    return _Round(rate, latencies)


def _starts(
    ways: Sequence[Way],
    image_shape: tuple[int, ...],
    batch_size: int,
    num_starts: int,
    report: Callable[[str], None],
) -> dict[str, list[Alone]]:
    """Every way in every round of starts, each in a process of its own."""
    found: dict[str, list[Alone]] = {way.name: [] for way in ways if way.alone is not None}
    for number in range(num_starts):
        for way in ways:
            if way.alone is not None:
                report(f"start {number + 1} of {num_starts}: {way.name}")
                found[way.name].append(start_alone(way.alone, image_shape, batch_size))
    return found


def _speed(
    way: Way, rounds: dict[str, list[_Round]], predictions: dict[str, Tensor], first: str
) -> PathSpeed:
    name, how = way.name, way.how
    if name not in rounds:
        return PathSpeed(name, how)
    rates = {path: [one.images_per_second for one in found] for path, found in rounds.items()}
    medians = {path: [statistics.median(one.latencies) for one in found] for path, found in rounds.items()}
    latencies = torch.tensor([ms for one in rounds[name] for ms in one.latencies], dtype=torch.float64)
    num_flips = int((predictions[name] != predictions[first]).sum())
    return PathSpeed(
        name=name,
        how=how,
        images_per_second=statistics.median(rates[name]),
        throughput_ratio=_ratio(rates[name], rates[first]),
        throughput_ratio_to_onnx=_ratio(rates[name], rates[ONNX]) if ONNX in rates else None,
        latency_median_ms=float(latencies.quantile(0.5)),
        latency_p99_ms=float(latencies.quantile(0.99)),
        latency_ratio=_ratio(medians[name], medians[first]),
        latency_ratio_to_onnx=_ratio(medians[name], medians[ONNX]) if ONNX in medians else None,
        num_flips=num_flips,
        prediction_flips=num_flips / len(predictions[name]),
    )


def _with_starts(speed: PathSpeed, started: dict[str, list[Alone]], first: str) -> PathSpeed:
    own = started.get(speed.name)
    if not own:
        return speed
    seconds = {name: [one.first_answer_seconds for one in found] for name, found in started.items()}
    peaks = [one.peak_mib for one in own if one.peak_mib is not None]
    return replace(
        speed,
        first_answer_seconds=statistics.median(seconds[speed.name]),
        first_answer_ratio=_ratio(seconds[speed.name], seconds[first]),
        peak_mib=statistics.median(peaks) if peaks else None,
    )


def _ratio(values: list[float], bases: list[float]) -> Ratio:
    ratios = [value / base for value, base in zip(values, bases, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
