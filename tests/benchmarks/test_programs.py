"""What all benchmarks have in common: how they are started, and what they refuse or warn of first."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from bncli.errors import BncliError
from tests.benchmarks import (
    accuracy,
    exact,
    export,
    inspection,
    loading,
    population,
    processes,
    ranks,
    report,
    scale,
    step,
    streamed,
)
from tests.benchmarks.conftest import Benchmark

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = {
    "accuracy": accuracy,
    "exact": exact,
    "export": export,
    "inspection": inspection,
    "loading": loading,
    "population": population,
    "processes": processes,
    "ranks": ranks,
    "report": report,
    "scale": scale,
    "step": step,
    "streamed": streamed,
}


def test_make_starts_the_programs_with_their_options() -> None:
    plan = subprocess.run(
        # inside `make test`, make would say that it enters and leaves a directory
        ["make", "--dry-run", "--no-print-directory", *(f"bench-{name}" for name in PROGRAMS),
         "ARGS=--rounds 2"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    started = [line for line in plan.stdout.splitlines() if " -m tests.benchmarks." in line]
    for line, name in zip(started, PROGRAMS, strict=True):
        assert line.endswith(f"-m tests.benchmarks.{name} --rounds 2")


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_with_its_exit_code_and_one_line(name: str) -> None:
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--nonsense"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("bncli: error: no such option: --nonsense")
    assert done.stderr.endswith(f"Try 'python -m tests.benchmarks.{name} --help'\n")
    assert len(done.stderr.splitlines()) == 1


def test_every_benchmark_in_the_measurements_is_called_with_options_that_it_has() -> None:
    calls = re.findall(
        r'^(?:\$ )?make bench-([a-z]+)(?: ARGS="(.*)")?$',
        (ROOT / ".readme" / "measurements.md").read_text(),
        re.MULTILINE,
    )
    assert {name for name, _ in calls} == set(PROGRAMS)
    for name, arguments in calls:
        command = typer.main.get_command(PROGRAMS[name].app)
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in shlex.split(arguments) if word.startswith("--")} <= known, name


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize(
    ("program", "measurement", "options"),
    [
        (scale, "bench_scale", ("--sizes", "1000")),
        (accuracy, "bench_accuracy", ("--target", "0.5")),
    ],
)
def test_emulated_bfloat16_is_named_before_anything_is_measured(
    benchmark: Benchmark,
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: Any,
    measurement: str,
    options: tuple[str, ...],
    is_fast: bool,
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise BncliError("here it would begin")

    monkeypatch.setattr("bncli.hardware._cpu_capabilities", lambda: {"avx2": True, "avx512_bf16": is_fast})
    monkeypatch.setattr(program, measurement, stop)
    outcome = benchmark(program.app, tiny_config, *options, "--set", "runtime.precision=bfloat16")
    assert outcome.code == 2
    *warnings, end = outcome.err.splitlines()
    assert end == "bncli: error: here it would begin"
    assert len(warnings) == (not is_fast)
    assert all("runtime.precision: bfloat16 may take many times as long" in line for line in warnings)
