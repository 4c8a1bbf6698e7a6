"""How a test calls one of the benchmarks: as a program, with its messages and exit code."""

from collections.abc import Callable

import pytest
import typer

from bncli.cli.app import main
from tests.conftest import Outcome

Benchmark = Callable[..., Outcome]


@pytest.fixture
def benchmark(capfd: pytest.CaptureFixture[str]) -> Benchmark:
    """Call a benchmark's program as `python -m` does."""

    def call(program: typer.Typer, *arguments: object) -> Outcome:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments], program=program, name="benchmark")
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return call
