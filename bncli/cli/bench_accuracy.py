"""`bncli bench accuracy`: how long training takes to reach an accuracy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption, SetOption
from bncli.errors import ConfigError

if TYPE_CHECKING:
    from bncli.bench import AccuracyBench


def bench_accuracy_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.")],
    overrides: SetOption = None,
    target: Annotated[str, typer.Option(help="Accuracies on the test split, as fractions.")] = "0.8,0.85,0.9",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs, with seeds 0, 1, ...")] = 3,
    as_json: JsonOption = False,
) -> int:
    """Time `bncli train` from the start of its process until it reaches an accuracy."""
    targets = _parse_targets(target)
    from bncli.bench import bench_accuracy
    from bncli.cli.render import print_json
    from bncli.config_file import load_config

    load_config(config, overrides)  # what is wrong with it is said at once
    result = bench_accuracy(config, overrides or [], targets, num_seeds=seeds, report=print_note)
    print_json(result) if as_json else _show(result)
    return 0


def _parse_targets(text: str) -> list[float]:
    try:
        targets = [float(part) for part in text.split(",")]
    except ValueError:
        targets = []
    if not targets or not all(0 < target < 1 for target in targets):
        raise ConfigError(
            "--target", [f"expected fractions between 0 and 1, such as 0.8,0.9, found {text!r}"]
        )
    return targets


def _show(result: "AccuracyBench") -> None:
    from bncli.cli.render import console_for_results, show_lines, table_of

    console = console_for_results()
    table = table_of(None, "test accuracy", "seeds that reached it", "seconds, mean", "deviation")
    for target in result.targets:
        table.add_row(
            f"{target.accuracy:.2%}",
            f"{target.num_reached} of {result.num_seeds}",
            _seconds(target.seconds_mean),
            _seconds(target.seconds_std),
        )
    console.print(table)
    console.print()
    spread = "" if result.accuracy_std is None else f" ± {result.accuracy_std:.2%}"
    machine = result.machine
    show_lines(
        console,
        {
            "last epoch": f"{result.accuracy_mean:.2%}{spread}, n = {result.num_seeds},"
            " without test-time augmentation",
            "whole run": f"{result.seconds_mean:.1f} s from the start of the process to its end",
            "peak memory": "unknown" if result.peak_mib is None else f"{result.peak_mib:,.0f} MiB",
            "machine": f"{machine['cpu']}, {machine['num_cpus']} CPUs, {machine.get('gpu', 'no GPU')};"
            f" torch {machine['torch']}, Python {machine['python']}",
            "bncli": f"{machine['bncli']}, commit {result.commit or 'unknown'}",
            "command": result.command,
        },
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
