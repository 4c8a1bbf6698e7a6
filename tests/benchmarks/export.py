"""`bncli predict` of one image, from the shell to the answer: a checkpoint beside its exports.

Every file is made once, by a command of its own, which is timed with its proof. Then the checkpoint and the
files take turns, each in a process of its own. Engines that are not installed are left out, and named.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from bncli.cli.app import main
from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption
from bncli.cli.tables.table import console_for_results, machine_line, print_json, table_of
from bncli.errors import BncliError
from bncli.export.engines import MissingEngineError
from bncli.export.write import format_of, require_writer
from bncli.hardware import describe_machine
from tests.benchmarks.child_process import BNCLI, Finished, run_child

app = typer.Typer(add_completion=False, rich_markup_mode=None)

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class ExportedBench:
    """One file, or the checkpoint itself; seconds are wall-clock, from before the process to its end."""

    name: str
    predict_seconds: list[float]  # of each round
    export_seconds: float | None  # with the proof; None: the checkpoint
    largest_difference: float | None  # that the proof found, relative to the largest output of the image
    num_bytes: int


@dataclass(frozen=True)
class ExportBench:
    """What was measured; the first row is the checkpoint."""

    rows: tuple[ExportedBench, ...]
    left_out: tuple[str, ...]
    machine: dict[str, Any]


def bench_export(checkpoint: Path, *, rounds: int = 5, suffixes: tuple[str, ...]) -> ExportBench:
    """Export to each format, and predict one image with each, in turns.

    Raises:
        BncliError: when a command fails.
    """
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="bncli-bench-") as name:
        folder = Path(name)
        image = folder / "photo.png"
        Image.effect_noise((64, 64), 80).convert("RGB").save(image)
        files, made, left_out = {CHECKPOINT: checkpoint}, {}, []
        for suffix in suffixes:
            file = folder / f"net{suffix}"
            try:
                require_writer(format_of(file))
            except MissingEngineError as error:
                left_out.append(f"{suffix}: {error}")
                continue
            made[suffix] = _run("export", str(checkpoint), "-o", str(file), "--json")
            print_note(f"{suffix}: exported in {made[suffix].seconds:.1f} s")
            files[suffix] = file
        done: dict[str, list[Finished]] = {one: [] for one in files}
        for number in range(rounds):
            for one, file in files.items():
                done[one].append(_run("predict", str(file), str(image)))
            shown = ", ".join(f"{one} {found[-1].seconds:.2f} s" for one, found in done.items())
            print_note(f"round {number + 1} of {rounds}: {shown}")
    rows = (_row(one, found, made.get(one), checkpoint) for one, found in done.items())
    return ExportBench(tuple(rows), tuple(left_out), describe_machine())


def _run(*words: str) -> Finished:
    done = run_child([*BNCLI, *words])
    if done.code:
        raise BncliError(f"bncli {words[0]} ended with {done.code}: {done.message[-500:]}")
    return done


def _row(name: str, done: list[Finished], made: Finished | None, checkpoint: Path) -> ExportedBench:
    document = None if made is None else json.loads(made.output)
    return ExportedBench(
        name=name,
        predict_seconds=[one.seconds for one in done],
        export_seconds=None if made is None else made.seconds,
        largest_difference=None if document is None else document["proof"]["max_rel_diff"],
        num_bytes=checkpoint.stat().st_size if document is None else document["num_bytes"],
    )


@app.command()
def run(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A file of `bncli train`.")],
    rounds: Annotated[int, typer.Option(min=1, help="How often each image is predicted.")] = 5,
    only: Annotated[
        str | None, typer.Option(metavar="SUFFIX", help="One format alone, such as .onnx.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Time bncli predict of one image with a checkpoint and with its exports."""
    suffixes = (".onnx", ".xml", ".pt2") if only is None else (only,)
    result = bench_export(checkpoint, rounds=rounds, suffixes=suffixes)
    print_json(result) if as_json else show_export_bench(result)
    return 0


def show_export_bench(result: ExportBench) -> None:
    """One row for the checkpoint, and one for each file."""
    console = console_for_results()
    table = table_of(None, "predict", "seconds", "ratio", "from", "to", "MB", "export s", "proof")
    bases = result.rows[0].predict_seconds
    for row in result.rows:
        ratios = [one / base for one, base in zip(row.predict_seconds, bases, strict=True)]
        cells = [f"{median(row.predict_seconds):.2f}", f"{median(ratios):.2f}"]
        cells += [f"{min(ratios):.2f}", f"{max(ratios):.2f}"]
        cells += [f"{row.num_bytes / 1e6:.1f}"]
        cells += ["-" if row.export_seconds is None else f"{row.export_seconds:.1f}"]
        cells += ["-" if row.largest_difference is None else f"{row.largest_difference:.0e}"]
        table.add_row(row.name, *cells)
    console.print(table)
    for line in result.left_out:
        console.print(f"left out: {line}")
    console.print(machine_line(result.machine))


if __name__ == "__main__":
    sys.exit(main(program=app, name="python -m tests.benchmarks.export"))
