"""One way to evaluate, in a process of its own: seconds to its first answer, and its peak of memory.

    python -m bncli.bench.alone SPECIFICATION

prints a line when one random image is answered, and the peak in MiB on a second line when two batches are. An
engine is opened as `bncli predict` opens its file, without PyTorch; PyTorch loads the checkpoint.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bncli.errors import BncliError
from bncli.export.engines import Array, OnnxRuntime, OpenVino
from bncli.export.record import Pixels, Precision

_NUM_BATCHES = 2


@dataclass(frozen=True)
class Specification:
    """What to start. Plain values only."""

    file: str
    way: str  # a TorchWay for a checkpoint, else onnxruntime, openvino or torch.export
    threads: int
    precision: Precision = "float32"
    pixels: Pixels = "uint8"
    runtime: dict[str, Any] | None = None  # of PyTorch, for a checkpoint
    network: dict[str, Any] | None = None  # the NetworkSource of a checkpoint


@dataclass(frozen=True)
class Alone:
    """Of one process."""

    first_answer_seconds: float  # from before it was started
    peak_mib: float | None  # of resident memory; None where the system does not tell


def start_alone(specification: Specification, image_shape: tuple[int, ...], batch_size: int) -> Alone:
    """Start the process, and wait for its end. Raises BncliError where it fails."""
    text = json.dumps({**asdict(specification), "shape": image_shape, "batch_size": batch_size})
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", __name__, text], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            assert process.stdout is not None
            try:
                process.stdout.readline()
                seconds = time.perf_counter() - start
                rest = process.stdout.read()
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            errors.seek(0)
            said = (errors.read().strip().splitlines() or ["without a word"])[-1]
            raise BncliError(f"{specification.way} in a process of its own failed: {said}")
    return Alone(seconds, json.loads(rest))


def peak_mib() -> float | None:
    """The most resident memory that this process had, in MiB."""
    # getrusage counts what the parent had when it started this process
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _opened(file: Path, specification: Specification) -> Callable[[Array], object]:
    way, threads = specification.way, specification.threads
    if way == "onnxruntime":
        return OnnxRuntime.open(file, threads)
    if way == "openvino":
        return OpenVino.open(file, threads, specification.precision)
    import torch

    from bncli.config_file import config_from_dict
    from bncli.runtime import resolve_runtime

    if way == "torch.export":
        from bncli.export.torch_engine import TorchExport

        torch.set_num_threads(threads)
        return TorchExport(file)
    from bncli.bench.network_source import NetworkSource
    from bncli.bench.torch_ways import torch_way

    config = config_from_dict({"runtime": specification.runtime}, source="bench eval")
    network = NetworkSource(**specification.network or {}).load()
    classify, _ = torch_way(way, network, resolve_runtime(config.runtime))  # type: ignore[arg-type]
    return lambda images: classify(torch.from_numpy(images))


def _main(text: str) -> None:
    values = json.loads(text)
    shape, batch_size = values.pop("shape"), values.pop("batch_size")
    specification = Specification(**values)
    compute = _opened(Path(specification.file), specification)
    images: Array = np.random.default_rng(0).integers(0, 256, (batch_size, *shape), np.uint8)
    if specification.pixels == "float32":
        images = images.astype(np.float32) / np.float32(255)
    compute(images[:1])
    print("answered", flush=True)
    for _ in range(_NUM_BATCHES):
        compute(images)
    print(json.dumps(peak_mib()))


if __name__ == "__main__":
    _main(sys.argv[1])
