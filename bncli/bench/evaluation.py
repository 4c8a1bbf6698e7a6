"""Evaluation by plain PyTorch, bncli and other engines, in turns: throughput, latency, changed predictions.

Every path takes the same uint8 images on the CPU and returns logits; to normalise the pixels and to lay out
memory is part of its work. Ratios are taken within a round and to plain PyTorch: float32, contiguous, the
network as it was trained.

ONNX Runtime is the rival that engineers compare CPU inference with. OpenVINO computes what `bncli export`
writes for it: BatchNorm folded, in bfloat16 where this CPU is fast at it.
"""

import importlib.util
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bncli.checkpoints import Checkpoint, load_model
from bncli.export import MissingEngineError, prepare
from bncli.export.engines import OpenVino, require
from bncli.export.record import Precision
from bncli.export.write import engine_files
from bncli.hardware import describe_machine, has_fast_bfloat16
from bncli.inference import fold_batch_norm, optimize_for_inference
from bncli.runtime import Runtime, short_compile_errors


def missing_packages() -> tuple[str, ...]:
    """Which of the packages that `onnx_classifier` needs are not installed."""
    return tuple(name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None)


def onnx_classifier(model: nn.Module, images: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
    """The model as a function from images (N, 3, H, W) to logits (N, num_classes), and the runtime's version.

    Float32 on the CPU, with as many threads as PyTorch has, after all optimisations of ONNX Runtime, which
    folds BatchNorm as well. `images` are an example of the inputs, on the CPU like the model.
    """
    # the exporter that needs no other package is deprecated, and says so
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        onnxruntime: Any = importlib.import_module("onnxruntime")
        file = Path(folder) / "network.onnx"
        torch.onnx.export(
            model,
            (images,),
            file,
            dynamo=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "N"}, "logits": {0: "N"}},
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def classify(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)

    return classify, str(onnxruntime.__version__)


Classify = Callable[[Tensor], Tensor]  # uint8 images (N, 3, H, W) on the CPU to logits (N, num_classes)

PLAIN, OURS, FOLDED, ONNX = "plain PyTorch", "bncli eval", "bncli folded", "ONNX Runtime"
COMPILED, OPENVINO = "torch.compile", "OpenVINO"
MAX_FLIPS = 0.002  # of predictions, in what is called the fastest: as many as bfloat16 changes
_WARM_UP_CALLS = 5  # single images, untimed: another path's threads may still be spinning


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
    throughput_ratio: Ratio | None = None  # to plain PyTorch; above 1 is faster
    latency_median_ms: float | None = None  # of one image, over all calls
    latency_p99_ms: float | None = None
    latency_ratio: Ratio | None = None  # to plain PyTorch, of the medians of a round; below 1 is faster
    latency_ratio_to_onnx: Ratio | None = None
    num_flips: int | None = None  # test images whose prediction is not that of plain PyTorch
    prediction_flips: float | None = None  # the same as a fraction


@dataclass(frozen=True)
class EvaluationBench:
    """What was measured."""

    paths: tuple[PathSpeed, ...]
    num_rounds: int
    batch_size: int
    batches_per_round: int
    calls_per_round: int  # with a single image
    num_test_images: int  # that flips are counted on
    onnxruntime: str | None  # its version
    runtime: dict[str, Any]
    machine: dict[str, Any]

    @property
    def verdict(self) -> str:
        """Which way is the fastest here, among those that change hardly any prediction."""
        usable = [path for path in self.paths if (path.prediction_flips or 0) <= MAX_FLIPS]
        rates = {path.name: path.images_per_second for path in usable if path.images_per_second is not None}
        times = {path.name: path.latency_median_ms for path in usable if path.latency_median_ms is not None}
        batches, single = max(rates, key=rates.__getitem__), min(times, key=times.__getitem__)
        if batches == single:
            return f"The fastest here is {batches}, for batches and for single images."
        return f"The fastest here is {batches} for batches, and {single} for single images."


@dataclass(frozen=True)
class _Round:
    images_per_second: float
    latencies: list[float]  # ms


def bench_evaluation(
    checkpoint: Checkpoint,
    images: Tensor,
    runtime: Runtime,
    *,
    num_rounds: int = 5,
    batch_size: int = 256,
    batches_per_round: int = 2,
    calls_per_round: int = 100,
    compiles: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> EvaluationBench:
    """Time all paths on test images (N, 3, H, W) of uint8, and compare their predictions.

    The number of threads is that of the process, for other engines as well. With `compiles` torch.compile is
    timed too: it compiles for up to a minute.

    Raises CompileError where it cannot.
    """
    paths, hows, version = _paths(checkpoint, images[:2], runtime)
    _add_compiled(paths, hows, checkpoint, runtime, compiles=compiles)
    _add_openvino(paths, hows, checkpoint, images[:2], runtime)
    predictions = {}
    for name, classify in paths.items():
        report(f"predictions: {name}")
        predictions[name] = _predictions(classify, images, batch_size)
    rounds = _in_turns(paths, images, num_rounds, batch_size, batches_per_round, calls_per_round, report)
    speeds = [_speed(name, how, rounds, predictions) for name, how in hows.items()]
    return EvaluationBench(
        paths=tuple(speeds),
        num_rounds=num_rounds,
        batch_size=batch_size,
        batches_per_round=batches_per_round,
        calls_per_round=calls_per_round,
        num_test_images=len(images),
        onnxruntime=version,
        runtime=runtime.describe(),
        machine=describe_machine(),
    )


def _paths(
    checkpoint: Checkpoint, example: Tensor, runtime: Runtime
) -> tuple[dict[str, Classify], dict[str, str], str | None]:
    """The ways to evaluate that can run here, what each does, and the version of ONNX Runtime."""
    device = runtime.device
    plain = load_model(checkpoint).to(device)
    ours = runtime.place_model(load_model(checkpoint))
    folded = optimize_for_inference(ours, dtype=runtime.precision)

    def classify_plain(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return plain(images.to(device)).cpu()  # type: ignore[no-any-return]

    def classify_ours(images: Tensor) -> Tensor:  # as `bncli eval` does
        with torch.no_grad(), runtime.autocast():
            return ours(runtime.place(images)).cpu()  # type: ignore[no-any-return]

    def classify_folded(images: Tensor) -> Tensor:
        return folded(images.to(device)).cpu()  # type: ignore[no-any-return]

    described = runtime.describe()
    precision, memory_format = described["precision"], described["memory_format"]
    paths: dict[str, Classify] = {PLAIN: classify_plain, OURS: classify_ours, FOLDED: classify_folded}
    hows = {
        PLAIN: "float32, contiguous, inference_mode",
        OURS: f"{precision}{' autocast' if precision != 'float32' else ''}, {memory_format}",
        FOLDED: f"{precision} weights, channels_last, chunks of {folded.rows}, inference_mode",
    }
    missing = missing_packages()
    if missing:
        return paths, {**hows, ONNX: f"not installed: pip install {' '.join(missing)}"}, None
    paths[ONNX], version = onnx_classifier(load_model(checkpoint), example)
    return paths, {**hows, ONNX: f"{version}, float32, CPU"}, version


def _add_compiled(
    paths: dict[str, Classify],
    hows: dict[str, str],
    checkpoint: Checkpoint,
    runtime: Runtime,
    *,
    compiles: bool,
) -> None:
    """torch.compile of the folded network, float32, for batches of any size."""
    if not compiles:
        return
    folded = fold_batch_norm(load_model(checkpoint)).model.to(runtime.device)
    compiled = torch.compile(folded, dynamic=True)

    def classify(images: Tensor) -> Tensor:
        with torch.inference_mode(), short_compile_errors():
            return compiled(images.to(runtime.device)).cpu()  # type: ignore[no-any-return]

    paths[COMPILED] = classify
    hows[COMPILED] = "float32, BatchNorm folded, batches of any size"


def _add_openvino(
    paths: dict[str, Classify],
    hows: dict[str, str],
    checkpoint: Checkpoint,
    example: Tensor,
    runtime: Runtime,
) -> None:
    """OpenVINO on the CPU, or the row that says how to install it."""
    try:
        require("openvino")
    except MissingEngineError as error:
        hows[OPENVINO] = str(error).replace("openvino is ", "")
        return
    precision: Precision = "bfloat16" if has_fast_bfloat16(torch.device("cpu")) else "float32"
    network = prepare(load_model(checkpoint), fold=True, precision=torch.float32, casts=False).model
    with tempfile.TemporaryDirectory() as folder:
        file = openvino_file(network, example, Path(folder) / "network.xml")
        engine = OpenVino.open(file, runtime.threads, precision)
    paths[OPENVINO] = lambda images: torch.from_numpy(engine(images.numpy()))
    hows[OPENVINO] = f"{engine.description.removeprefix('OpenVINO ')}, {precision}, CPU"


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


def _speed(name: str, how: str, rounds: dict[str, list[_Round]], predictions: dict[str, Tensor]) -> PathSpeed:
    if name not in rounds:
        return PathSpeed(name, how)
    rates = {path: [one.images_per_second for one in found] for path, found in rounds.items()}
    medians = {path: [statistics.median(one.latencies) for one in found] for path, found in rounds.items()}
    latencies = torch.tensor([ms for one in rounds[name] for ms in one.latencies], dtype=torch.float64)
    num_flips = int((predictions[name] != predictions[PLAIN]).sum())
    return PathSpeed(
        name=name,
        how=how,
        images_per_second=statistics.median(rates[name]),
        throughput_ratio=_ratio(rates[name], rates[PLAIN]),
        latency_median_ms=float(latencies.quantile(0.5)),
        latency_p99_ms=float(latencies.quantile(0.99)),
        latency_ratio=_ratio(medians[name], medians[PLAIN]),
        latency_ratio_to_onnx=_ratio(medians[name], medians[ONNX]) if ONNX in medians else None,
        num_flips=num_flips,
        prediction_flips=num_flips / len(predictions[name]),
    )


def _ratio(values: list[float], bases: list[float]) -> Ratio:
    ratios = [value / base for value, base in zip(values, bases, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))
