"""`bncli report` on 10,000 layers beside `inspect-stats --json`, and how soon a browser has the page.

The two commands take turns, each in a process of its own. The page is opened by Chromium where there is one,
each time in a new window.
"""

import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from bncli.cli.app import main
from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption
from bncli.cli.tables.table import console_for_results, print_json, table_of
from bncli.errors import BncliError
from bncli.hardware import describe_machine
from tests.benchmarks.child_process import BNCLI, run_child
from tests.benchmarks.inspection import CHANNELS, _state_dict, _write_torch_zip

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True)
class ReportBench:
    """One entry per round; seconds are wall-clock, with starting Python and importing torch."""

    num_layers: int
    inspect_seconds: list[float]
    report_seconds: list[float]
    page_megabytes: float
    open_seconds: list[float]  # until figures and tables of the first screen are there; empty: no browser
    machine: dict[str, Any]


def bench_report(*, num_layers: int = 10_000, rounds: int = 3, directory: Path | None = None) -> ReportBench:
    """Write a file, inspect it and report on it in turns, and open the last page.

    Raises:
        BncliError: when a command fails.
    """
    inspecting, reporting = [], []
    with tempfile.TemporaryDirectory(prefix="bncli-bench-", dir=directory) as folder:
        path, page = Path(folder) / "model.pt", Path(folder) / "report.html"
        _write_torch_zip(path, _state_dict(num_layers, num_layers * CHANNELS * 8))
        for number in range(rounds):
            inspecting.append(_seconds("inspect-stats", str(path), "--json"))
            reporting.append(_seconds("report", str(path), "-o", str(page)))
            print_note(f"round {number + 1}: {inspecting[-1]:.2f} s and {reporting[-1]:.2f} s")
        with ThreadPoolExecutor(1) as pool:  # Playwright wants a thread without an event loop
            opening = pool.submit(_open, page, rounds).result()
        size = page.stat().st_size / 1e6
    return ReportBench(num_layers, inspecting, reporting, size, opening, describe_machine())


def _seconds(*words: str) -> float:
    done = run_child([*BNCLI, *words])
    if done.code not in (0, 1):
        raise BncliError(f"bncli {words[0]} ended with {done.code}: {done.message[-500:]}")
    return done.seconds


def _open(page: Path, rounds: int) -> list[float]:
    chromium = shutil.which("chromium")
    if chromium is None:
        print_note("there is no chromium, so the page was not opened")
        return []
    from playwright.sync_api import sync_playwright

    seconds = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(rounds):
            tab = browser.new_page()
            start = time.perf_counter()
            tab.goto(page.as_uri())
            # the page's scripts run before it counts as loaded
            if tab.evaluate("document.documentElement.dataset.ready") != "true":
                raise BncliError(f"{page}: its script did not run to the end")
            seconds.append(time.perf_counter() - start)
            tab.close()
        browser.close()
    return seconds


@app.command()
def run(
    layers: Annotated[int, typer.Option(min=1, max=100_000, help="BatchNorm layers.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is done.")] = 3,
    as_json: JsonOption = False,
) -> int:
    """Time bncli report beside inspect-stats on a large file, and a browser opening the page."""
    result = bench_report(num_layers=layers, rounds=rounds)
    print_json(result) if as_json else show_report_bench(result)
    return 0


def show_report_bench(result: ReportBench) -> None:
    """One row per thing that was timed, and how the two commands compare."""
    console = console_for_results()
    table = table_of(None, "", "seconds, median", "fastest", "slowest")
    rows = {
        "inspect-stats --json": result.inspect_seconds,
        "report": result.report_seconds,
        "opening the page": result.open_seconds,
    }
    for name, seconds in rows.items():
        if seconds:
            table.add_row(name, *(f"{value:.2f}" for value in (median(seconds), min(seconds), max(seconds))))
    console.print(table)
    pairs = zip(result.report_seconds, result.inspect_seconds, strict=True)
    ratio = median(report / inspect for report, inspect in pairs)
    machine = result.machine
    console.print(
        f"{result.num_layers:,} layers, a page of {result.page_megabytes:.2f} MB; report takes {ratio:.2f}"
        f" times as long as inspect-stats\n{machine['cpu']}, {machine['num_cpus']} CPUs; torch"
        f" {machine['torch']}, Python {machine['python']}"
    )


if __name__ == "__main__":
    sys.exit(main(program=app, name="python -m tests.benchmarks.report"))
