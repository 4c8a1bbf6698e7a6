"""`bncli inspect-stats` on files far larger than what it has to read: seconds, and peak of memory.

The files are written as sparse files where the file system can: the weights are holes that read as zeros,
which is as good, since nobody reads them. A directory of torch.distributed.checkpoint, and safetensors of the
same size beside it, have one GiB at most, as the former is written whole. Each is inspected by a process of
its own.
"""

import json
import shutil
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed.checkpoint
import typer
from torch import Tensor

from bncli.cli.app import main
from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption
from bncli.cli.tables.table import console_for_results, print_json, table_of
from bncli.errors import BncliError
from bncli.hardware import describe_machine
from tests.benchmarks.child_process import BNCLI, run_child

app = typer.Typer(add_completion=False, rich_markup_mode=None)

CHANNELS = 256
MAX_WRITTEN = 1.0  # GiB of what cannot be sparse


@dataclass(frozen=True)
class Inspection:
    """One file, inspected once in a process of its own that had imported nothing yet."""

    file: str  # its format
    gib: float  # size of the file
    num_layers: int
    num_tensors: int
    seconds: float  # wall-clock, with starting Python and importing torch
    peak_mib: float  # resident memory of the process


@dataclass(frozen=True)
class InspectionBench:
    """What was measured, and what the same machine needs for `import torch` alone."""

    import_torch_seconds: float
    import_torch_peak_mib: float
    inspections: tuple[Inspection, ...]
    machine: dict[str, Any]


def bench_inspection(
    *,
    gib: float = 8.0,
    num_layers: int = 200,
    many_layers: int = 10_000,
    directory: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> InspectionBench:
    """Write, inspect and remove five: large ones in each format, and a file with many small layers.

    Raises:
        BncliError: when they cannot be written or inspected.
    """
    seconds, peak = _run([sys.executable, "-c", "import torch"])[:2]
    small = many_layers * CHANNELS * 8 / 2**30  # weights of the many layers: 8 bytes a channel
    cases = [
        ("torch zip", gib, num_layers),
        ("safetensors", gib, num_layers),
        ("safetensors", min(gib, MAX_WRITTEN), num_layers),
        ("distributed", min(gib, MAX_WRITTEN), num_layers),
        ("torch zip", small, many_layers),
    ]
    writers = {
        "torch zip": _write_torch_zip,
        "safetensors": _write_safetensors,
        "distributed": _write_distributed,
    }
    inspections = []
    try:
        with tempfile.TemporaryDirectory(prefix="bncli-bench-", dir=directory) as folder:
            for kind, size, layers in cases:
                path = Path(folder) / "model.pt"
                writers[kind](path, _state_dict(layers, int(size * 2**30)))
                inspections.append(_inspect(path, kind))
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                report(f"{kind} of {inspections[-1].gib:.2f} GiB: {inspections[-1].seconds:.2f} s")
    except OSError as error:
        raise BncliError(f"{directory or tempfile.gettempdir()}: {error.strerror or error}") from None
    return InspectionBench(seconds, peak, tuple(inspections), describe_machine())


def _inspect(path: Path, kind: str) -> Inspection:
    files = path.iterdir() if path.is_dir() else (path,)
    gib = sum(file.stat().st_size for file in files) / 2**30
    seconds, peak, output = _run([*BNCLI, "inspect-stats", str(path), "--json"])
    found = json.loads(output)
    return Inspection(kind, gib, found["num_layers"], found["num_tensors"], seconds, peak)


def _run(command: list[str]) -> tuple[float, float, str]:
    """Seconds, peak of resident memory in MiB, and what it printed."""
    done = run_child(command)
    if done.code not in (0, 1):
        raise BncliError(f"inspecting ended with {done.code}: {done.message[-500:]}")
    return done.seconds, done.peak_mib, done.output


def _state_dict(num_layers: int, num_bytes: int) -> dict[str, Tensor]:
    """A convolution's weight, never touched and so without memory, and a BatchNorm in every layer."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer in range(num_layers):
        state[f"layers.{layer}.conv.weight"] = torch.empty(max(1, num_bytes // num_layers // 4))
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"layers.{layer}.norm.{leaf}"] = torch.rand(CHANNELS, generator=generator) + 0.5
        state[f"layers.{layer}.norm.num_batches_tracked"] = torch.tensor(1000)
    return state


def _write_torch_zip(path: Path, state: dict[str, Tensor]) -> None:
    """By `torch.save`, which leaves room for the numbers; BatchNorm's are then put in."""
    with torch.serialization.skip_data():
        torch.save(state, path)
    with zipfile.ZipFile(path) as archive, path.open("r+b") as file:
        entries = [archive.getinfo(f"{path.stem}/data/{index}") for index in range(len(state))]
        for entry, (name, tensor) in zip(entries, state.items(), strict=True):
            if ".norm." in name:
                file.seek(entry.header_offset + 26)
                name_length, padding = struct.unpack("<HH", file.read(4))
                file.seek(entry.header_offset + 30 + name_length + padding)
                file.write(tensor.numpy().tobytes())


def _write_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    header: dict[str, dict[str, Any]] = {}
    position = 0
    for name, tensor in state.items():
        end = position + tensor.numel() * tensor.itemsize
        kind = "I64" if tensor.dtype == torch.int64 else "F32"
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for name, tensor in state.items():
            if ".norm." in name:
                file.seek(start + header[name]["data_offsets"][0])
                file.write(tensor.numpy().tobytes())
        file.truncate(start + position)


def _write_distributed(path: Path, state: dict[str, Tensor]) -> None:
    """By PyTorch, in one process; it writes every number."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what no_dist asks for
        torch.distributed.checkpoint.save(state, checkpoint_id=path, no_dist=True)


@app.command()
def run(
    gib: Annotated[float, typer.Option(min=0.001, max=1000, help="Size of the large files, in GiB.")] = 8.0,
    layers: Annotated[int, typer.Option(min=1, max=10_000, help="BatchNorm layers in them.")] = 200,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the files are written, and removed again.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Time inspect-stats on large files, and on one of 10,000 layers; with its peak of memory."""
    result = bench_inspection(gib=gib, num_layers=layers, directory=directory, report=print_note)
    print_json(result) if as_json else show_inspection_bench(result)
    return 0


def show_inspection_bench(result: InspectionBench) -> None:
    """One row per file; the first row is what any program with torch needs."""
    console = console_for_results()
    table = table_of(None, "file", "GiB", "layers", "tensors", "seconds", "peak MiB")
    seconds, peak = f"{result.import_torch_seconds:.2f}", f"{result.import_torch_peak_mib:.0f}"
    table.add_row("(import torch)", "", "", "", seconds, peak)
    for done in result.inspections:
        counts = (f"{done.num_layers:,}", f"{done.num_tensors:,}")
        table.add_row(done.file, f"{done.gib:.2f}", *counts, f"{done.seconds:.2f}", f"{done.peak_mib:.0f}")
    console.print(table)
    machine = result.machine
    console.print(
        f"{machine['cpu']}, {machine['num_cpus']} CPUs; torch {machine['torch']}, Python {machine['python']}"
    )


if __name__ == "__main__":
    sys.exit(main(program=app, name="python -m tests.benchmarks.inspection"))
