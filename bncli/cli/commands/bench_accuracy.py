"""`bncli bench accuracy`: seconds from the start of `bncli train` to an accuracy on the test split."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bncli.cli.messages import print_error, print_note
from bncli.cli.options import ConfigArgument, JsonOption, SetOption
from bncli.cli.stop_signals import StopSignals
from bncli.errors import BncliError, ConfigError

if TYPE_CHECKING:
    from bncli.bench import SeedRun


def bench_time_to_accuracy(
    config: ConfigArgument,
    target: Annotated[str, typer.Option(metavar="A,A,...", help="Accuracies, as fractions such as 0.9.")],
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs, with the seeds 0 to N-1.")] = 3,
    overrides: SetOption = None,
    tta: Annotated[
        Literal["flip", "shifts"] | None,
        typer.Option("--tta", help="Evaluate the end of each run over views as well, apart."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Time `bncli train` from the start of its process to each accuracy, over several seeds."""
    targets = parse_targets(target)
    if not config.is_file():
        raise BncliError(f"{config}: no such file")
    from bncli.bench import bench_accuracy
    from bncli.cli.subject import open_config
    from bncli.cli.tables.bench_accuracy import show_accuracy_bench
    from bncli.cli.tables.table import print_json

    open_config(config, overrides)  # what nobody can run is refused before a process is started
    with StopSignals() as signals:
        try:
            result = bench_accuracy(config, targets, seeds, overrides or (), views=tta, report=_report)
        except KeyboardInterrupt:
            print_error("interrupted")
            return signals.exit_code
    print_json(result) if as_json else show_accuracy_bench(result)
    return 0


def parse_targets(text: str) -> tuple[float, ...]:
    """Accuracies such as "0.80,0.9", in rising order, each once.

    Raises ConfigError for anything but fractions between 0 and 1, both excluded.
    """
    try:
        found = {float(part) for part in text.split(",")}
    except ValueError:
        found = set()
    if not found or not all(0 < value < 1 for value in found):
        wanted = f"expected accuracies above 0 and below 1, such as 0.80,0.85,0.90, found {text!r}"
        raise ConfigError("--target", [wanted])
    return tuple(sorted(found))


def _report(run: "SeedRun") -> None:
    print_note(
        f"seed {run.seed}: accuracy {run.accuracy:.2%} after {run.epochs[-1].epoch} epochs,"
        f" {run.seconds:.1f} s, {run.peak_mib:,.0f} MiB"
    )
