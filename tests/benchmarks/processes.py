"""Training in several processes beside one: images/s, memory of each process, and a slow network.

Each way is measured in processes of its own, all ways in turns. All compute the same parts of the same
batches, but for the last, which computes each batch as a whole.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bncli.cli.app import main
from bncli.cli.opened_checkpoint import open_config
from bncli.cli.options import ConfigArgument, JsonOption, SetOption
from bncli.cli.progress import ProgressReporter
from bncli.cli.tables.table import console_for_results, machine_line, print_json, show_lines, table_of
from bncli.config import Config
from bncli.config_file import dump_config
from bncli.errors import BncliError
from bncli.hardware import describe_machine
from tests.benchmarks.child_process import run_child

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Way:
    """One way to compute the same steps."""

    name: str
    processes: int
    threads: int  # of each
    delay_ms: float = 0  # of the network between them; 0: that of this machine
    in_parts: bool = True


@dataclass(frozen=True)
class WayResult:
    """What one way took."""

    way: Way
    images_per_second: float  # median over the rounds
    ratio: float  # to the first way, median of the ratios within a round
    ratio_min: float
    ratio_max: float
    memory_mib: tuple[float, ...]  # of each process, in the last round; shared pages divided


@dataclass(frozen=True)
class ProcessesBench:
    """What was measured."""

    ways: tuple[WayResult, ...]
    num_rounds: int
    steps_per_round: int
    batch_size: int
    part_size: int
    delay_ms: float
    gigabits: float
    gradient_bytes: int
    image_mib: float
    machine: dict[str, Any]


def bench_processes(
    config: Config,
    *,
    num_ranks: int,
    num_rounds: int,
    num_steps: int,
    delay_ms: float,
    gigabits: float,
    report: Callable[[str], None] = lambda _: None,
) -> ProcessesBench:
    """Measure all ways in turns; every second round backwards.

    Raises:
        BncliError: when one of them cannot be carried out here.
    """
    ways = [
        Way(f"{num_ranks} processes", num_ranks, 1),
        Way("1 process, 1 thread", 1, 1),
        Way(f"1 process, {num_ranks} threads", 1, num_ranks),
        Way("the same, whole batches", 1, num_ranks, in_parts=False),
        Way(f"{num_ranks} processes, slow network", num_ranks, 1, delay_ms),
    ]
    part_size = -(-config.train.batch_size // num_ranks)
    found: list[list[dict[str, Any]]] = []
    with tempfile.TemporaryDirectory(prefix="bncli-bench-") as folder:
        for number in range(num_rounds):
            order = ways if number % 2 == 0 else ways[::-1]
            results = {
                way.name: _measure(config, way, part_size, num_steps, gigabits, Path(folder)) for way in order
            }
            found.append([results[way.name] for way in ways])
            rates = ", ".join(f"{each['images_per_second']:,.0f}" for each in found[-1])
            report(f"round {number + 1} of {num_rounds}: {rates} images/s")
    return ProcessesBench(
        ways=tuple(_summarize(way, [each[index] for each in found], found) for index, way in enumerate(ways)),
        num_rounds=num_rounds,
        steps_per_round=num_steps,
        batch_size=config.train.batch_size,
        part_size=part_size,
        delay_ms=delay_ms,
        gigabits=gigabits,
        gradient_bytes=found[0][0]["gradient_bytes"],
        image_mib=found[0][0]["image_mib"],
        machine=describe_machine(),
    )


def _summarize(way: Way, rounds: list[dict[str, Any]], found: list[list[dict[str, Any]]]) -> WayResult:
    rates = [each["images_per_second"] for each in rounds]
    ratios = [rate / each[0]["images_per_second"] for rate, each in zip(rates, found, strict=True)]
    return WayResult(
        way, statistics.median(rates), statistics.median(ratios), min(ratios), max(ratios),
        tuple(rounds[-1]["memory_mib"]),
    )  # fmt: skip


def _measure(
    config: Config, way: Way, part_size: int, num_steps: int, gigabits: float, folder: Path
) -> dict[str, Any]:
    train = config.train.model_copy(update={"micro_batch_size": part_size if way.in_parts else None})
    runtime = config.runtime.model_copy(update={"threads": way.threads, "device": "cpu"})
    path = folder / "config.yaml"
    path.write_text(dump_config(config.model_copy(update={"train": train, "runtime": runtime})))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={way.processes}"]
    words = [
        "-m",
        "tests.benchmarks.processes_worker",
        str(path),
        str(num_steps),
        str(way.delay_ms),
        str(gigabits),
    ]
    command = [sys.executable, *(torchrun if way.processes > 1 else []), *words]
    done = run_child(command, OMP_NUM_THREADS=str(way.threads))  # torchrun would say that it chooses one
    if done.code:
        raise BncliError(f"{way.name} ended with {done.code}: {done.message[-300:]}")
    result: dict[str, Any] = json.loads(done.output)
    return result


@app.command()
def run(
    config: ConfigArgument,
    overrides: SetOption = None,
    processes: Annotated[int, typer.Option(min=2, max=64, help="Processes, of one thread each.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of all ways, in turns.")] = 5,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Training steps in a round.")] = 10,
    delay: Annotated[float, typer.Option(min=0.001, help="Of the slow network, in ms a hop.")] = 1.0,
    gigabits: Annotated[float, typer.Option(min=0.001, help="Of the slow network, in Gbit/s.")] = 1.0,
    as_json: JsonOption = False,
) -> int:
    """Measure training in several processes beside one, in images/s and memory, and over a slow network."""
    loaded = open_config(config, overrides)
    with ProgressReporter() as progress:
        result = bench_processes(
            loaded,
            num_ranks=processes,
            num_rounds=rounds,
            num_steps=steps,
            delay_ms=delay,
            gigabits=gigabits,
            report=progress.note,
        )
    print_json(result) if as_json else show_processes_bench(result)
    return 0


def show_processes_bench(result: ProcessesBench) -> None:
    console = console_for_results()
    lines = {
        "machine": machine_line(result.machine),
        "batch": f"{result.batch_size} images in parts of {result.part_size}",
        "gradients": f"{result.gradient_bytes / 2**20:.1f} MiB a step",
        "network": f"{result.delay_ms:g} ms a hop and {result.gigabits:g} Gbit/s where slow (simulated: each"
        " exchange ends no sooner)",
        "memory": f"of each process, shared pages divided; the images are {result.image_mib:.0f} MiB",
    }
    show_lines(console, lines)
    table = table_of(None, "computed by", "images/s", "ratio", "from", "to", "MiB", left=1)
    for each in result.ways:
        spread = (f"{each.ratio:.3f}", f"{each.ratio_min:.3f}", f"{each.ratio_max:.3f}")
        memory = ", ".join(f"{mib:,.0f}" for mib in each.memory_mib)
        table.add_row(each.way.name, f"{each.images_per_second:,.0f}", *spread, memory)
    console.print()
    console.print(table)
    console.print(
        f"medians of n = {result.num_rounds} rounds of {result.steps_per_round} steps in turns; ratios to the"
        " first line"
    )


if __name__ == "__main__":
    sys.exit(main(program=app, name="python -m tests.benchmarks.processes"))
