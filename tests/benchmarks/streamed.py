"""`bncli recalibrate --method precise` on streamed images: beside a plain evaluation, and its memory.

    make bench-streamed ARGS="--only speed"     4 rounds of 1,000 JPEGs of 224x224
    make bench-streamed ARGS="--only memory"    1,000 and 20,000 JPEGs of 64x64

Speed: the plain loop evaluates torchvision's network over a DataLoader of torchvision's ImageFolder. The
library measures the population over such a DataLoader. The command is the whole `bncli recalibrate`, which
reads its file, reads the folder by workers of its own, and writes a file. All have the same weights,
precision, memory format, batch size and number of workers. Each pass has a process of its own
(`streamed_worker.py`), as each tool has its own way with threads and memory; the tools take turns, and ratios
are taken within a round. Imports are not timed, and each process first runs over a few images.

Memory: the whole command in a process of its own for each number of images, which are smaller ones, since
what could grow is what is kept for each image. Each process tells its peak at its end; Linux knows it.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from PIL import Image

from bncli.cli.app import main
from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption
from bncli.cli.tables.table import (
    console_for_results,
    machine_line,
    print_json,
    runtime_line,
    show_lines,
    table_of,
)
from bncli.config import RuntimeConfig
from bncli.errors import BncliError, ConfigError
from bncli.hardware import describe_machine
from bncli.runtime import resolve_runtime
from bncli.usable_cpus import usable_cpus
from bncli.wording import plural
from tests.benchmarks.child_process import run_child
from tests.benchmarks.population import PassTime, in_turns, network_of
from tests.benchmarks.streamed_worker import NUM_CLASSES, TOOLS, command_words

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Peak:
    """Of one whole command."""

    num_images: int
    mib: float  # resident memory of its process
    worker_mib: float  # of its largest worker, which shares pages with it


@dataclass(frozen=True)
class StreamedBench:
    """What was measured."""

    network: str
    num_images: int
    image_size: int
    kilobytes_an_image: float
    batch_size: int
    num_workers: int
    num_rounds: int
    times: tuple[PassTime, ...]
    memory_image_size: int
    peaks: tuple[Peak, ...]
    runtime: dict[str, Any]
    machine: dict[str, Any]

    @property
    def growth(self) -> float | None:
        """Of the peak, from the fewest images to the number that has the highest; None without two."""
        return None if len(self.peaks) < 2 else max(one.mib for one in self.peaks) / self.peaks[0].mib - 1


def bench_streamed(
    *,
    network: str,
    num_rounds: int,
    num_images: int,
    image_size: int,
    batch_size: int,
    num_workers: int,
    memory_images: tuple[int, ...],
    memory_image_size: int,
    directory: Path | None,
    report: Callable[[str], None],
) -> StreamedBench:
    """Make the images, measure what is asked for, and remove them.

    Without rounds speed is not measured, without numbers of images memory is not. Raises BncliError where
    images cannot be written, or a network cannot be measured.
    """
    model = network_of(network, image_size).eval()
    runtime = resolve_runtime(RuntimeConfig(precision="float32"))
    how = {"network": network, "batch_size": batch_size, "workers": num_workers}
    try:
        with tempfile.TemporaryDirectory(prefix="bncli-bench-", dir=directory) as name:
            folder = Path(name)
            torch.save(model.state_dict(), folder / "network.pt")
            peaks = []
            if memory_images:
                report(f"memory: makes {max(memory_images):,} images")
                small = make_images(folder / "small", max(memory_images), memory_image_size)
                for number in memory_images:
                    report(f"memory: recalibrates {number:,} images")
                    command = command_words(
                        folder, small, f"new{number}.pt", image_size=memory_image_size, **how
                    )
                    peaks.append(_peak([*command, "--num-images", str(number)], number))
                    report(f"memory: {number:,} images, {peaks[-1].mib:.0f} MiB")
            times: tuple[PassTime, ...] = ()
            size = 0.0
            if num_rounds:
                report(f"speed: makes {num_images:,} images")
                root = make_images(folder / "images", num_images, image_size)
                files = list((root / "train").rglob("*.jpg"))
                size = sum(file.stat().st_size for file in files) / len(files)
                make_images(folder / "few", 2 * batch_size, image_size)
                tools = {
                    tool: partial(_seconds, tool, folder, how | {"image_size": image_size}, report)
                    for tool in TOOLS
                }
                times = in_turns(tools, num_rounds, lambda text: report(f"speed: {text}"), warm_up=False)
    except OSError as error:
        raise BncliError(f"{directory or tempfile.gettempdir()}: {error.strerror or error}") from None
    return StreamedBench(
        network=f"torchvision {network}",
        num_images=num_images,
        image_size=image_size,
        kilobytes_an_image=size / 1000,
        batch_size=batch_size,
        num_workers=num_workers,
        num_rounds=num_rounds,
        times=times,
        memory_image_size=memory_image_size,
        peaks=tuple(peaks),
        runtime=runtime.describe(),
        machine=describe_machine(),
    )


def make_images(root: Path, num_images: int, size: int) -> Path:
    """Write JPEGs to train/ and a few to test/, by as many threads as there are CPUs; gives `root`."""
    for split in ("train", "test"):
        for label in range(NUM_CLASSES):
            (root / split / f"class{label}").mkdir(parents=True)
    numbers = {"train": num_images, "test": 2 * NUM_CLASSES}
    with ThreadPoolExecutor(usable_cpus().count) as pool:
        for split, count in numbers.items():
            make = partial(_make_image, root / split, size)
            for _ in pool.map(make, range(count)):
                pass
    return root


def _make_image(folder: Path, size: int, number: int) -> None:
    """Blobs of colour at four scales, with fine noise: a JPEG of 0.5 to 2 bytes a pixel, as photos are."""
    random = np.random.default_rng([number, size])
    pixels = random.normal(0, 12, (size, size, 3))
    for cells in (3, 8, 24, 60):
        coarse = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        pixels += np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)) / 4
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(folder / f"class{number % NUM_CLASSES}" / f"{number:06}.jpg", quality=95)


def _seconds(tool: str, folder: Path, how: dict[str, Any], report: Callable[[str], None]) -> float:
    """Of one pass, in a process of its own."""
    words = [sys.executable, "-m", "tests.benchmarks.streamed_worker", tool]
    done = run_child([*words, json.dumps(how | {"folder": str(folder)})])
    if done.code:
        raise BncliError(f"{tool} ended with {done.code}: {done.message[-500:]}")
    seconds, cpu_seconds = json.loads(done.output)
    report(f"speed: {tool}, {cpu_seconds:.1f} seconds of CPUs")
    return float(seconds)


def _peak(command: list[str], num_images: int) -> Peak:
    """As a process of its own tells it at its end; what its parent is told begins with the parent's."""
    program = f"""
import json, resource, sys
from pathlib import Path
from bncli.cli.app import main
code = main({command!r})
lines = Path("/proc/self/status").read_text().splitlines()
own = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
print(json.dumps([own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
sys.exit(code)
"""
    done = run_child([sys.executable, "-c", program])
    if done.code:
        raise BncliError(f"recalibrate ended with {done.code}: {done.message[-500:]}")
    own, worker = json.loads(done.output.splitlines()[-1])
    return Peak(num_images, own / 1024, worker / 1024)


@app.command()
def run(
    network: Annotated[str, typer.Option(metavar="NAME", help="A classifier of torchvision's.")] = "resnet18",
    only: Annotated[
        Literal["speed", "memory"] | None,
        typer.Option(metavar="PART", help="speed or memory. Default: both."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of all tools, in turns.")] = 4,
    images: Annotated[int, typer.Option(min=2, max=100_000, help="Images in a pass.")] = 1000,
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="Height and width in pixels.")] = 224,
    batch_size: Annotated[int, typer.Option(min=2, max=10_000, help="Images in a batch.")] = 250,
    workers: Annotated[
        int | None, typer.Option(min=0, max=1024, help="Processes that read. Default: one for each CPU.")
    ] = None,
    memory: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of images whose peak of memory is measured.")
    ] = "1000,20000",
    memory_image_size: Annotated[
        int, typer.Option(min=32, max=1024, help="Height and width in pixels of these.")
    ] = 64,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the images are written, and removed again.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Time recalibration from an image folder beside a plain evaluation, and measure its memory."""
    result = bench_streamed(
        network=network,
        num_rounds=0 if only == "memory" else rounds,
        num_images=images,
        image_size=image_size,
        batch_size=batch_size,
        num_workers=usable_cpus().count if workers is None else workers,
        memory_images=() if only == "speed" else _numbers(memory),
        memory_image_size=memory_image_size,
        directory=directory,
        report=print_note,
    )
    print_json(result) if as_json else show_streamed_bench(result)
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers of images, rising. Raises ConfigError for others."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if any(one < 2 for one in found):
        raise ConfigError("--memory", [f"expected numbers of images such as 1000,5000, found {text!r}"])
    if not Path("/proc/self/status").exists():
        raise ConfigError("--memory", ["only Linux tells the peak of memory; leave it out: --only speed"])
    return tuple(found)


def show_streamed_bench(result: StreamedBench) -> None:
    """Times, then memory, then what they were measured on."""
    console = console_for_results()
    show_lines(console, {"machine": machine_line(result.machine), "runtime": runtime_line(result.runtime)})
    console.print()
    lines = {}
    if result.times:
        table = table_of("One pass, in turns", "tool", "seconds", "ratio", "from", "to")
        for one in result.times:
            ratios = (f"{value:.3f}" for value in (one.ratio, one.ratio_min, one.ratio_max))
            table.add_row(one.tool, f"{one.seconds:.2f}", *ratios)
        console.print(table)
        console.print()
        lines = {
            "images": f"{result.num_images:,} JPEGs of {result.image_size}x{result.image_size},"
            f" {result.kilobytes_an_image:.0f} kB each, in batches of {result.batch_size};"
            f" {plural(result.num_workers, 'worker')}",
            "ratio": f"to the plain evaluation with {result.network}; median of n = {result.num_rounds}",
            "tools": "bncli.recalibrate has the plain DataLoader; bncli recalibrate is the command",
        }
    if result.peaks:
        peaks = table_of("Peak of memory of the whole command", "images", "MiB", "largest worker", left=0)
        for peak in result.peaks:
            peaks.add_row(f"{peak.num_images:,}", f"{peak.mib:.0f}", f"{peak.worker_mib:.0f}")
        console.print(peaks)
        console.print()
        size = f"images of {result.memory_image_size}x{result.memory_image_size}; n = 1 each"
        grown = "" if result.growth is None else f"; at most {result.growth:.1%} above the fewest images"
        lines["memory"] = size + grown
    show_lines(console, lines)


if __name__ == "__main__":
    sys.exit(main(program=app, name="python -m tests.benchmarks.streamed"))
