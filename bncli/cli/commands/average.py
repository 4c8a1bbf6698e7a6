"""`bncli average A B C -o NEW`: the average of several checkpoints of one network."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bncli.cli.help_page import COMPUTED, INPUT, OUTPUT
from bncli.cli.messages import print_note
from bncli.cli.named_network import named_network
from bncli.cli.opened_checkpoint import check_labels, load_subject_data, open_subject
from bncli.cli.options import (
    DataRootOption,
    DeviceOption,
    JsonOption,
    KeyOption,
    LogitsOption,
    ModelArgOption,
    ModelOption,
    NormalizationOption,
    SetOption,
    check_ending_of_copy,
    check_new,
)
from bncli.cli.overrides import effective_overrides
from bncli.errors import BncliError, ConfigError, DataError, ForeignNetworkError
from bncli.wording import plural

if TYPE_CHECKING:
    from torch import Tensor

    from bncli.checkpoints import Checkpoint
    from bncli.cli.opened_checkpoint import Subject
    from bncli.cli.progress import ProgressReporter
    from bncli.training import AveragedCheckpoint, Calibration, Judge


def average_into_file(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="CHECKPOINT...", help="Two or more checkpoints of one network."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="NEW",
            help="The file of the average: a copy of the first checkpoint with other tensors.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--of",
            metavar="RUN_DIR",
            help="Average the epochs that this run kept (train.keep_epochs).",
            rich_help_panel=INPUT,
        ),
    ] = None,
    last: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Only the last N of them.  [default: all]",
            rich_help_panel=INPUT,
        ),
    ] = None,
    shares: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="W,W,...",
            help="How much each checkpoint counts, as in 1,2,4.  [default: all alike]",
            rich_help_panel=COMPUTED,
        ),
    ] = None,
    statistics: Annotated[
        Literal["recalibrate", "pooled", "average", "first"],
        typer.Option(
            metavar="KIND",
            help="Where running statistics come from; recalibrate: measured on training images; pooled: mean"
            " and variance of the checkpoints' distributions together; average: each number averaged; first:"
            " those of the first checkpoint.",
            rich_help_panel=COMPUTED,
        ),
    ] = "recalibrate",
    greedy: Annotated[
        bool,
        typer.Option(
            "--greedy",
            help="Leave out checkpoints that lower the accuracy of the average: from the best on, one after"
            " the other is tried.",
            rich_help_panel=COMPUTED,
        ),
    ] = False,
    method: Annotated[
        Literal["exact", "precise"],
        typer.Option(
            metavar="METHOD",
            help="How statistics are measured: see `bncli recalibrate --help`.",
            rich_help_panel=COMPUTED,
        ),
    ] = "exact",
    num_images: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Measure them on this many training images, drawn at random.  [default: all]",
            rich_help_panel=COMPUTED,
        ),
    ] = None,
    no_evaluate: Annotated[
        bool,
        typer.Option(
            "--no-evaluate",
            help="Do not evaluate the checkpoints and the average.",
            rich_help_panel=COMPUTED,
        ),
    ] = False,
    model: ModelOption = None,
    model_args: ModelArgOption = None,
    key: KeyOption = None,
    normalization: NormalizationOption = None,
    logits: LogitsOption = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    data_root: DataRootOption = None,
    as_json: JsonOption = False,
) -> int:
    """Average checkpoints of one network into a new file.

    Weights are averaged in float64. Running statistics are not weights: those of the average are measured on
    training images, unless --statistics says otherwise. Where there are test images, the checkpoints and the
    average are evaluated, with running statistics of each kind.

    Examples:
    bncli average runs/first/best.pt runs/first/last.pt -o average.pt
    bncli average --of runs/first --last 3 -o average.pt
    bncli average a.pt b.pt -o new.pt --statistics pooled
    """
    from bncli.cli.progress import ProgressReporter
    from bncli.cli.tables.average import AverageReport, show_average
    from bncli.cli.tables.table import print_json
    from bncli.training import Calibration, average_and_judge

    paths = _find_sources(sources or [], run_dir, last)
    output = _check_output(output, paths)
    weights = _parse_shares(shares, len(paths))
    data_overrides = effective_overrides("average", overrides, device=device, data_root=data_root)
    named = named_network(model, model_args, key if model is not None else None, None, normalization, logits)
    if named is not None:
        named = replace(named, partial=None)
    own = _are_own(paths)
    if own and key is not None:
        raise ConfigError("--key", ["a checkpoint of `bncli train` has one network; leave it out"])
    place = "state_dict" if own else key
    kind = "torch zip" if own else _check_container(paths[0], place)
    check_ending_of_copy(output, paths[0], kind)
    with ProgressReporter() as progress:
        first = runtime = judge = None
        if own or named is not None:
            subject = open_subject(paths[0], data_overrides, command="average", named=named)
            how = Calibration(method, num_images)
            judge = _judge(
                subject,
                how,
                progress,
                evaluates=not no_evaluate,
                needed=statistics == "recalibrate" or greedy,
            )
            runtime = subject.runtime.describe()
            first = None if subject.own is None else _without_tensors(subject.own)
            del subject  # and its tensors with it
        elif statistics == "recalibrate" or greedy:
            raise ConfigError(
                "bncli average",
                [
                    "running statistics are measured with the network and its images: give --model NAME and"
                    " --data-root FOLDER, or --statistics pooled, which needs none"
                ],
            )
        read = _read_own if own else None
        made = average_and_judge(paths, weights, statistics, judge, key=place, read=read, greedy=greedy)
    try:
        if first is not None and runtime is not None:
            _save_own(first, made, runtime, output)
        else:
            _rewrite(paths[0], place, made, output)
    except OSError as error:
        raise BncliError(f"{output}: cannot be written: {error.strerror or error}") from error
    print_note(f"wrote {output}")
    report = AverageReport(str(output), made, runtime)
    print_json(report.to_dict()) if as_json else show_average(report)
    return 0


def _find_sources(sources: list[Path], run_dir: Path | None, last: int | None) -> list[Path]:
    """The checkpoints as given, or those that a run kept. Raises ConfigError for neither or both."""
    if run_dir is None:
        if last is not None:
            raise ConfigError("--last", ["goes with --of RUN_DIR"])
        if len(sources) < 2:
            raise ConfigError("bncli average", ["give two or more checkpoints, or --of RUN_DIR"])
        return sources
    if sources:
        raise ConfigError("--of", ["give checkpoints or a run, not both"])
    from bncli.training.run_dir import kept_epochs

    if not run_dir.is_dir():
        raise ConfigError("--of", [f"{run_dir}: no such directory"])
    found = kept_epochs(run_dir)
    if len(found) < 2:
        raise ConfigError(
            "--of",
            [
                f"{run_dir} keeps {plural(len(found), 'epoch')}, and two are needed; train with --set"
                " train.keep_epochs=5 to keep the last five"
            ],
        )
    if last is not None and last > len(found):
        print_note(f"{run_dir} keeps {plural(len(found), 'epoch')}, so --last {last} takes these")
    return found[-(last or len(found)) :]


def _check_output(output: Path | None, sources: list[Path]) -> Path:
    """Refuse before the work begins what could not be written after it."""
    if output is None:
        raise ConfigError("bncli average", ["give -o NEW for the file of the average"])
    check_new(output, *sources)
    return output


def _parse_shares(text: str | None, number: int) -> list[float]:
    if text is None:
        return [1.0] * number
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != number or not all(math.isfinite(share) and share >= 0 for share in shares):
        raise ConfigError(
            "--weights", [f"expected {number} numbers of 0 or more, as in 1,2,4; found {text!r}"]
        )
    if not any(shares):
        raise ConfigError("--weights", ["one of them has to be above 0"])
    return shares


def _are_own(paths: list[Path]) -> bool:
    """Whether they are bncli's. Raises CheckpointError for a mixture."""
    from bncli.checkpoints.own import check_own

    try:
        check_own(paths[0])
    except ForeignNetworkError:
        return False
    for path in paths[1:]:
        check_own(path)
    return True


def _read_own(path: Path) -> "dict[str, Tensor]":
    """Checked against its digests."""
    from bncli.checkpoints import load_checkpoint

    return load_checkpoint(path).state_dict


def _without_tensors(checkpoint: "Checkpoint") -> "Checkpoint":
    """What it says of itself, with the names of its tensors."""
    names = {name: tensor.to("meta") for name, tensor in checkpoint.state_dict.items()}
    return replace(checkpoint.finished(), state_dict=names)


def _check_container(path: Path, key: str | None) -> str:
    """The kind of the first file. Raises where an average could not be written into a copy of it."""
    from bncli.checkpoints import check_rewritable, open_checkpoint

    with open_checkpoint(path, key) as checkpoint:
        names = [f"{checkpoint.prefix}{name}" for name in checkpoint.tensors]
        if checkpoint.kind.endswith("index"):
            raise BncliError(f"{path}: an index of several files, which are not written; save it as one")
        place, kind = checkpoint.key, checkpoint.kind
    check_rewritable(path, names, place, any_tensor=True)
    return kind


def _judge(
    subject: "Subject", how: "Calibration", progress: "ProgressReporter", *, evaluates: bool, needed: bool
) -> "Judge | None":
    """The network with its images; without images None, where they are not needed."""
    from bncli.training import Judge

    if not (evaluates or needed):
        return None
    try:
        dataset = load_subject_data(subject, classifies=evaluates, only_train=not evaluates)
        if evaluates:
            check_labels(dataset, "--no-evaluate needs none")
    except DataError as error:
        if needed:
            raise DataError(f"{error}; --statistics pooled needs no images") from None
        print_note(f"not evaluated: {error}")
        return None
    names = {name: name for name in subject.model.state_dict()}
    if subject.named is not None:
        loaded = subject.named[1]
        from bncli.checkpoints import open_checkpoint

        with open_checkpoint(subject.path, loaded.key) as checkpoint:
            prefix = checkpoint.prefix
        names = {name: origin.removeprefix(prefix) for name, origin in loaded.names.items()}
    size = subject.config.runtime.eval_batch_size
    return Judge(subject.model, names, dataset, subject.runtime, how, size, evaluates, progress)


def _save_own(
    first: "Checkpoint", made: "AveragedCheckpoint", runtime: dict[str, object], output: Path
) -> None:
    from dataclasses import asdict

    from bncli.checkpoints import file_sha256, save_checkpoint
    from bncli.hardware import describe_machine

    record = {
        "sources": [
            {"file": Path(source.path).name, "share": source.share, "sha256": file_sha256(source.path)}
            for source in made.sources
        ],
        "statistics": made.statistics,
    }
    recalibration = None
    if made.recalibration is not None:
        recalibration = {
            "method": made.recalibration.method,
            "num_images": made.recalibration.num_images,
            "recalibrated_layers": [layer.name for layer in made.recalibration.layers],
            "runtime": runtime,
            "machine": describe_machine(),
        }
    score = made.scores.get(made.statistics)
    save_checkpoint(
        replace(
            first,
            state_dict={name: made.state_dict[name] for name in first.state_dict},
            test_accuracy=None if score is None else score.accuracy,
            test_loss=None if score is None else score.loss,
            recalibration=recalibration,
            averaged=record | {"scores": {how: asdict(one) for how, one in made.scores.items()}},
        ),
        output,
    )


def _rewrite(path: Path, key: str | None, made: "AveragedCheckpoint", output: Path) -> None:
    from bncli.checkpoints import open_checkpoint, rewrite

    with open_checkpoint(path, key) as checkpoint:
        prefix, place = checkpoint.prefix, checkpoint.key
    rewrite(
        path,
        output,
        {f"{prefix}{name}": one for name, one in made.state_dict.items()},
        place,
        any_tensor=True,
    )
    print_note(f"all else in {output}, an optimizer's state for example, is that of {path}")
