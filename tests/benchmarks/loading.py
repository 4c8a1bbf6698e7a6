"""`load_weights` against `torch.load` and `load_state_dict`: seconds side by side, and peak of memory.

Both load the same file into the same network, by turns, so that the file is in the system's cache for both
and other processes disturb both alike. The peak is that of a process of its own for each, less what it had
with the network in memory; Linux tells it.

Then all running statistics of the file are exchanged in a copy of it, by `rewrite`, in turns with `cp`; after
`cp` the copy is flushed to the disk as well, as `rewrite` does with its own.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn

from bncli.checkpoints import load_weights, rewrite, statistics_in_file
from bncli.cli.app import main
from bncli.cli.options import JsonOption
from bncli.cli.tables.table import console_for_results, print_json, table_of
from bncli.errors import BncliError
from bncli.hardware import describe_machine
from tests.benchmarks.child_process import run_child

app = typer.Typer(add_completion=False, rich_markup_mode=None)

WIDTH = 1024
LAYER_BYTES = WIDTH * WIDTH * 9 * 4
Loader = Literal["bncli", "PyTorch"]
Writer = Literal["bncli", "cp"]


@dataclass(frozen=True)
class LoadingBench:
    """Seconds of each round, and how much more memory than the network itself each loader takes."""

    gib: float
    seconds: dict[Loader, list[float]]
    peak_mib: dict[Loader, float]
    writing_seconds: dict[Writer, list[float]]
    machine: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Of the medians: below 1 bncli is faster."""
        return statistics.median(self.seconds["bncli"]) / statistics.median(self.seconds["PyTorch"])

    @property
    def writing_ratio(self) -> float:
        """Of the medians of `rewrite` and `cp`."""
        took = self.writing_seconds
        return statistics.median(took["bncli"]) / statistics.median(took["cp"])


def bench_loading(gib: float, rounds: int, directory: Path | None) -> LoadingBench:
    """Write a checkpoint as DistributedDataParallel names it, load it by turns, and remove it.

    Raises BncliError when it cannot be written or loaded.
    """
    num_layers = max(1, round(gib * 2**30 / LAYER_BYTES))
    seconds: dict[Loader, list[float]] = {"PyTorch": [], "bncli": []}
    try:
        with tempfile.TemporaryDirectory(prefix="bncli-bench-", dir=directory) as folder:
            path = Path(folder) / "model.pt"
            network = empty_network(num_layers)
            torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
            for _ in range(rounds):
                for loader, times in seconds.items():
                    start = time.perf_counter()
                    load(loader, network, path)
                    times.append(time.perf_counter() - start)
            writing = _time_writing(network, path, rounds)
            del network
            peaks = {loader: _peak(loader, num_layers, path) for loader in seconds}
            size = path.stat().st_size / 2**30
    except OSError as error:
        raise BncliError(f"{directory or tempfile.gettempdir()}: {error.strerror or error}") from None
    return LoadingBench(size, seconds, peaks, writing, describe_machine())


def _time_writing(network: nn.Module, path: Path, rounds: int) -> dict[Writer, list[float]]:
    """Seconds of copies of the file, with new running statistics and as it is."""
    loaded = load_weights(network, path)
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for buffer in network.buffers():
        buffer.add_(1)
    buffers = statistics_in_file(network, loaded, layers)
    seconds: dict[Writer, list[float]] = {"cp": [], "bncli": []}
    for number in range(rounds):
        for writer, times in list(seconds.items())[:: 1 if number % 2 else -1]:
            target = path.with_name("copy.pt")
            start = time.perf_counter()
            if writer == "bncli":
                rewrite(path, target, buffers, loaded.key)
            else:
                copy_to_disk(path, target)
            times.append(time.perf_counter() - start)
            target.unlink()
    return seconds


def copy_to_disk(source: Path, target: Path) -> None:
    """As `cp` does where there is one, then flushed."""
    cp = shutil.which("cp")
    if cp is None:
        shutil.copyfile(source, target)
    elif run_child([cp, str(source), str(target)]).code:
        raise BncliError(f"cp cannot write {target}")
    with target.open("rb") as file:
        os.fsync(file.fileno())


def empty_network(num_layers: int) -> nn.Module:
    """Convolutions with BatchNorm, all zeros."""
    with torch.device("meta"):
        network = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, bias=False), nn.BatchNorm2d(WIDTH))
                for _ in range(num_layers)
            )
        )
    network = network.to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.zero_()
    return network


def load(loader: Loader, network: nn.Module, path: Path) -> None:
    """By one of the two."""
    if loader == "bncli":
        load_weights(network, path)
        return
    state = torch.load(path, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})


def _peak(loader: Loader, num_layers: int, path: Path) -> float:
    """MiB that loading adds to the peak of a process that has the network: as the process itself tells.

    What its parent is told begins with the parent's own memory.
    """
    program = f"""
from tests.benchmarks.loading import *
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
network = empty_network({num_layers})
before = peak()
load({loader!r}, network, Path({str(path)!r}))
print(peak() - before)
"""
    done = run_child([sys.executable, "-c", program])
    if done.code:
        raise BncliError(f"loading ended with {done.code}: {done.message[-500:]}")
    return float(done.output)


@app.command()
def run(
    gib: Annotated[float, typer.Option(min=0.01, max=100, help="Size of the checkpoint, in GiB.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="How often each loads it.")] = 5,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the file is written, and removed again.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Load and rewrite a large checkpoint, by bncli and by PyTorch and cp, in turns."""
    result = bench_loading(gib, rounds, directory)
    if as_json:
        print_json(result)
        return 0
    console = console_for_results()
    table = table_of(None, f"{result.gib:.2f} GiB", "median s", "fastest s", "slowest s", "peak MiB")
    for loader, times in result.seconds.items():
        spread = (statistics.median(times), min(times), max(times))
        table.add_row(loader, *(f"{value:.2f}" for value in spread), f"{result.peak_mib[loader]:.0f}")
    console.print(table)
    written = table_of(None, "new statistics in a copy", "median s", "fastest s", "slowest s")
    for writer, times in result.writing_seconds.items():
        spread = (statistics.median(times), min(times), max(times))
        written.add_row(writer, *(f"{value:.2f}" for value in spread))
    console.print(written)
    cpu, version = result.machine["cpu"], result.machine["torch"]
    console.print(
        f"bncli takes {result.ratio:.2f} times the time to load, and {result.writing_ratio:.2f} times"
        f" that of cp to write (n={rounds}; {cpu}, torch {version})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(program=app, name="python -m tests.benchmarks.loading"))
