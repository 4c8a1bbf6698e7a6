"""The ways to evaluate a checkpoint, or a file of `bncli export`, that are timed beside each other.

Every one takes the same raw images on the CPU and returns logits; to normalise the pixels and to lay out
memory is part of its work. The first one is what the others are compared with. ONNX Runtime is the rival that
engineers compare CPU inference with. Engines compute what `bncli export` writes for them, BatchNorm folded.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bncli.bench.alone import Specification
from bncli.bench.network_source import NetworkSource
from bncli.bench.torch_ways import Classify, TorchWay, torch_way
from bncli.errors import BncliError
from bncli.export import EngineNetwork, ExportedFile, MissingEngineError, open_engine, prepare
from bncli.export.engines import TITLES, Engine, EngineName, OnnxRuntime, OpenVino, require_engine
from bncli.export.record import Pixels, Precision
from bncli.export.write import engine_files
from bncli.hardware import has_fast_bfloat16
from bncli.runtime import Runtime, short_compile_errors

Load = Callable[[], nn.Module]  # in float32 and eval mode on the CPU

PLAIN, OURS, FOLDED, COMPILED = "plain PyTorch", "bncli eval", "bncli folded", "torch.compile"
ONNX, OPENVINO = TITLES["onnxruntime"], TITLES["openvino"]
FLOAT32, BFLOAT16 = f"{OPENVINO} float32", f"{OPENVINO} bfloat16"  # of a file that says which is meant
EXPORTED = "torch.export"
_TORCH: dict[TorchWay, str] = {"plain": PLAIN, "eval": OURS, "folded": FOLDED, "compiled": COMPILED}
_SUFFIXES: dict[EngineName, str] = {"onnxruntime": ".onnx", "openvino": ".xml"}


@dataclass(frozen=True)
class Way:
    """One of them. Where it cannot be had, a package is missing say, `how` tells why: nothing is called."""

    name: str
    how: str
    classify: Classify | None = None
    alone: Specification | None = None  # the same in a process of its own


def ways_of_checkpoint(
    source: NetworkSource,
    example: Tensor,
    runtime: Runtime,
    folder: Path,
    *,
    compiles: bool,
    load: Load | None = None,
) -> tuple[Way, ...]:
    """Those of PyTorch, torch.compile among them if it is asked for, then those of other engines.

    `load` makes the network of the source where that is at hand: one for each way.
    `example` are two images (2, ...). The engines' files are written to `folder`.

    Raises BncliError for a network that cannot be made.
    """
    pixels: Pixels = "float32" if example.is_floating_point() else "uint8"
    load = load or source.load
    return (
        *_by_torch(source, load, runtime, pixels, compiles=compiles),
        *_by_engines(load, example, runtime, folder, pixels),
    )


def _by_torch(
    source: NetworkSource, load: Load, runtime: Runtime, pixels: Pixels, *, compiles: bool
) -> list[Way]:
    described = runtime.describe()
    ways = []
    for way, name in _TORCH.items():
        if way != "compiled" or compiles:
            classify, how = torch_way(way, load(), runtime)
            alone = Specification(
                source.file, way, runtime.threads, pixels=pixels, runtime=described, network=asdict(source)
            )
            ways.append(Way(name, how, classify, alone))
    return ways


def _by_engines(load: Load, example: Tensor, runtime: Runtime, folder: Path, pixels: Pixels) -> list[Way]:
    """ONNX Runtime in float32, and OpenVINO in the precision of the runtime."""
    ours: Precision = "bfloat16" if runtime.precision == torch.bfloat16 else "float32"
    precisions: dict[EngineName, Precision] = {"onnxruntime": "float32", "openvino": ours}
    network = prepare(load(), fold=True, precision=torch.float32, casts=False).model
    ways = []
    for name, title in TITLES.items():
        try:
            require_engine(name)
            file = folder / f"network{_SUFFIXES[name]}"
            engine_files(network, example, file)
            ways.append(_way(title, name, file, runtime.threads, precisions[name], pixels))
        except BncliError as error:  # not installed, or the network cannot be handed to it
            ways.append(Way(title, str(error)))
    return ways


def ways_of_file(exported: ExportedFile, threads: int, *, compiles: bool) -> tuple[Way, ...]:
    """Its own engine, in float32 where the engine chooses the precision, and others that can read it.

    Raises MissingEngineError without its own engine, CheckpointError where that cannot open it.
    """
    record = exported.known
    if exported.kind == "pt2":
        return _by_torch_export(exported, threads, compiles=compiles)
    ways = []
    if exported.kind == "onnx":
        ways.append(_way(ONNX, "onnxruntime", exported.path, threads, record.precision, record.pixels))
    precisions: list[Precision] = ["float32"]
    if has_fast_bfloat16(torch.device("cpu")) or record.precision == "bfloat16":
        precisions.append("bfloat16")
    for precision in precisions:
        title = BFLOAT16 if precision == "bfloat16" else FLOAT32
        try:
            ways.append(_way(title, "openvino", exported.path, threads, precision, record.pixels))
        except MissingEngineError as error:
            if exported.kind == "openvino":
                raise
            return (*ways, Way(OPENVINO, str(error)))
    return tuple(ways)


def _by_torch_export(exported: ExportedFile, threads: int, *, compiles: bool) -> tuple[Way, ...]:
    record = exported.known
    engine = open_engine(exported)
    alone = Specification(str(exported.path), EXPORTED, threads, pixels=record.pixels)
    network = EngineNetwork.of(exported, engine)
    version = engine.description.removeprefix(EXPORTED).strip()
    ways = (Way(EXPORTED, f"{version}, {record.precision}, CPU", network.forward, alone),)
    if not compiles:
        return ways
    module: Callable[[Tensor], Tensor] = torch.compile(
        torch.export.load(exported.path).module(), dynamic=True
    )

    def classify(images: Tensor) -> Tensor:
        with torch.no_grad(), short_compile_errors():
            return module(images if record.pixels == "uint8" else images.float() / 255)

    return (*ways, Way(COMPILED, f"{record.precision}, batches of any size", classify))


def _way(
    title: str,
    name: EngineName,
    file: Path,
    threads: int,
    precision: Precision,
    pixels: Pixels,
) -> Way:
    engine: Engine
    if name == "onnxruntime":
        engine = OnnxRuntime.open(file, threads)
    else:
        engine = OpenVino.open(file, threads, precision)
    network = EngineNetwork(engine, pixels=pixels, precision=precision, sentence="")
    version = engine.description.removeprefix(TITLES[name]).strip()
    alone = Specification(str(file), name, threads, precision, pixels)
    return Way(title, f"{version}, {precision}, CPU", network.forward, alone)
