"""`bncli recalibrate`: population statistics instead of running statistics, in a new checkpoint."""

from dataclasses import replace
from functools import partial as bind
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bncli.cli.help_page import CHECKED, COMPUTED, OUTPUT
from bncli.cli.messages import print_note
from bncli.cli.named_network import as_typed, is_address, named_network
from bncli.cli.opened_checkpoint import check_labels, load_subject_data, open_again, open_subject
from bncli.cli.options import (
    CheckpointArgument,
    DataRootOption,
    DeviceOption,
    JsonOption,
    KeyOption,
    LogitsOption,
    ModelArgOption,
    ModelOption,
    NormalizationOption,
    PartialOption,
    SetOption,
    check_ending_of_copy,
    check_new,
)
from bncli.cli.overrides import effective_overrides
from bncli.cli.shared_work import shared_work
from bncli.errors import BncliError, ConfigError, DataError, NoClassifierError, NoTestSplitError
from bncli.wording import list_names

if TYPE_CHECKING:
    from bncli.checkpoints import LoadedWeights
    from bncli.cli.opened_checkpoint import Subject
    from bncli.data import Dataset
    from bncli.distributed import Processes, Ranks
    from bncli.training import Calibration, RecalibratedNetwork, Verification

MAX_ERROR = 1e-6  # of --verify: what remains is the rounding of float32 buffers, about 1e-7


def recalibrate_into_file(
    checkpoint: CheckpointArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="NEW",
            help="The file of the new checkpoint. Without it, and with --verify, nothing is written.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    model: ModelOption = None,
    model_args: ModelArgOption = None,
    key: KeyOption = None,
    partial: PartialOption = None,
    normalization: NormalizationOption = None,
    logits: LogitsOption = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    data_root: DataRootOption = None,
    method: Annotated[
        Literal["exact", "precise", "debias"],
        typer.Option(
            metavar="METHOD",
            help="exact: one layer after the other, each in a pass of its own; precise: all layers in one"
            " pass, as fvcore's PreciseBN does; debias: no pass, only the share of the initial values is"
            " taken out of the running statistics.",
            rich_help_panel=COMPUTED,
        ),
    ] = "exact",
    num_images: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Measure on this many training images, drawn at random.  [default: all]",
            rich_help_panel=COMPUTED,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Images in a batch.  [default: runtime.eval_batch_size]",
            rich_help_panel=COMPUTED,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Replace statistics only of layers whose names match, as in 'stages.1.*'.",
            rich_help_panel=COMPUTED,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Stop measuring when the standard error of every layer's mean is below X standard"
            " deviations, as in 0.001.",
            rich_help_panel=COMPUTED,
        ),
    ] = None,
    no_evaluate: Annotated[
        bool,
        typer.Option(
            "--no-evaluate",
            help="Do not evaluate before and after, and read no test image: for networks that are no"
            " classifiers, and images without labels.",
            rich_help_panel=COMPUTED,
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check that each layer's statistics are those of its inputs in eval mode.",
            rich_help_panel=CHECKED,
        ),
    ] = False,
    max_error: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="The relative error that --verify allows in a channel.",
            rich_help_panel=CHECKED,
        ),
    ] = MAX_ERROR,
    as_json: JsonOption = False,
) -> int:
    """Measure population statistics and save them in a new file.

    Running statistics are averages over the last training batches. They are replaced by the mean and the
    variance over all training images; the weights stay as they are. Exit code 1 if --verify finds statistics
    that do not fit.

    Examples:
    bncli recalibrate runs/first/last.pt -o recalibrated.pt
    bncli recalibrate runs/first/last.pt -o quick.pt --num-images 2000
    bncli recalibrate runs/first/last.pt -o new.pt --num-images 2000 --verify
    """
    from bncli.cli.tables.recalibrate import (
        RecalibrateReport,
        show_recalibrate,
        show_verification,
        verification_document,
    )
    from bncli.cli.tables.table import print_json
    from bncli.data.dataset import NO_IMAGES
    from bncli.training import Calibration

    _check_options(checkpoint, output, verify=verify, tolerance=tolerance, max_error=max_error)
    overrides = effective_overrides("recalibrate", overrides, device=device, data_root=data_root)
    named = named_network(model, model_args, key, partial, normalization, logits)
    evaluate = output is not None and not no_evaluate
    needs_images = evaluate or verify or method != "debias"
    subject = open_subject(
        checkpoint, overrides, command="recalibrate", named=named, needs_images=needs_images
    )
    if output is not None:
        _check_container(subject, layers)
        kind = "torch zip" if subject.named is None else subject.named[1].kind
        check_ending_of_copy(output, checkpoint, kind)
    how = Calibration(method, num_images, batch_size, layers, tolerance)
    _settle_memory(subject, method)
    with shared_work(subject, how=how, evaluate=evaluate, verify=verify) as work:
        ranks, dataset = work.ranks, NO_IMAGES
        if needs_images:
            dataset = _load_data(subject, work.processes, evaluate=evaluate)
        if output is None:
            found = _verify(subject, dataset, how, max_error, ranks)
        else:
            made = _recalibrate(checkpoint, output, subject, dataset, how, ranks, evaluate=evaluate)
            verification = None
            if verify:  # the new checkpoint as any other command will see it, on the images that it records
                again = Calibration() if named is None else how
                new = _reopen(output, subject, dataset) if work.is_main else _as_written(subject, made)
                verification = _verify(new, dataset, again, max_error, ranks)
    if not work.is_main:
        return 0  # rank 0 tells, by its exit code too
    if output is None:
        if as_json:
            print_json(verification_document(str(checkpoint), found))
        else:
            show_verification(str(checkpoint), found)
        return 0 if found.self_consistent else 1
    report = RecalibrateReport(
        str(checkpoint), str(output), subject.epoch, dataset.name if needs_images else None, made,
        subject.runtime.describe(), verification, subject.describe_network(),
    )  # fmt: skip
    print_json(report.to_dict()) if as_json else show_recalibrate(report)
    return 1 if verification is not None and not verification.self_consistent else 0


def _check_options(
    checkpoint: Path, output: Path | None, *, verify: bool, tolerance: float | None, max_error: float
) -> None:
    """Refuse before the work begins what could not be done, or written after it."""
    if tolerance is not None and not tolerance > 0:
        raise ConfigError("--tolerance", [f"expected a number above 0, found {tolerance:g}"])
    if not max_error > 0:
        raise ConfigError("--max-error", [f"expected a number above 0, found {max_error:g}"])
    if output is None:
        if not verify:
            raise ConfigError(
                "bncli recalibrate",
                ["give -o NEW for the new checkpoint, or --verify to check this one"],
            )
        return
    if is_address(checkpoint):
        raise BncliError(
            f"{as_typed(checkpoint)}: new ones are made of files on this machine; download it first"
        )
    check_new(output, checkpoint)


def _check_container(subject: "Subject", layers: str | None) -> None:
    """Raise before the work begins where new statistics could not be written into the file."""
    if subject.named is None:
        return
    from bncli.batchnorm.population.selection import select_layers
    from bncli.checkpoints import check_rewritable, statistics_in_file

    loaded = subject.named[1]
    if loaded.kind.endswith("index"):
        raise BncliError(f"{subject.path}: an index of several files, which are not written; save it as one")
    chosen = select_layers(subject.model, layers).layers
    check_rewritable(subject.path, statistics_in_file(subject.model, loaded, chosen), loaded.key)


def _settle_memory(subject: "Subject", method: str) -> None:
    """Keep freed memory where every batch needs the same: an eighth to a fifth of the CPU time is saved.

    Not for `exact`: what it keeps of layers for later passes would lie between activations of other sizes
    (measured with ResNet-18: a peak of 860 MiB instead of 758).
    """
    if method == "precise" and subject.config.runtime.reuse_memory and subject.runtime.device.type == "cpu":
        from bncli.runtime import keep_freed_memory

        keep_freed_memory()


def _load_data(subject: "Subject", processes: "Processes | None", *, evaluate: bool) -> "Dataset":
    try:
        dataset = load_subject_data(
            subject, classifies=evaluate, only_train=not evaluate, processes=processes
        )
    except NoClassifierError as error:
        fix = "--no-evaluate recalibrates a network that is no classifier of these images"
        raise NoClassifierError(f"{error}; {fix}") from None
    except NoTestSplitError as error:
        raise DataError(f"{error}; --no-evaluate recalibrates without any") from None
    if evaluate:
        check_labels(dataset, "--no-evaluate recalibrates without any")
    return dataset


def _recalibrate(
    path: Path,
    output: Path,
    subject: "Subject",
    dataset: "Dataset",
    how: "Calibration",
    ranks: "Ranks",
    *,
    evaluate: bool,
) -> "RecalibratedNetwork":
    from bncli.checkpoints import file_sha256, save_checkpoint
    from bncli.cli.progress import ProgressReporter
    from bncli.training import recalibrate_checkpoint, recalibrate_network

    size = subject.config.runtime.eval_batch_size
    with ProgressReporter() as progress:
        if subject.named is not None:
            made = recalibrate_network(
                subject.model,
                dataset,
                subject.runtime,
                how,
                eval_batch_size=size,
                evaluate=evaluate,
                ranks=ranks,
                progress=progress,
            )
            write = bind(_rewrite, subject, subject.named[1], made, output)
        else:
            source = {"file": path.name, "sha256": file_sha256(path)}
            made = own = recalibrate_checkpoint(
                subject.checkpoint,
                dataset,
                subject.runtime,
                how,
                source=source,
                eval_batch_size=size,
                evaluate=evaluate,
                ranks=ranks,
                progress=progress,
            )
            write = bind(save_checkpoint, own.checkpoint, output)
    with ranks.together():  # where one cannot write, all end
        if ranks.rank == 0:
            try:
                write()
            except OSError as error:
                raise BncliError(f"{output}: cannot be written: {error.strerror or error}") from error
            print_note(f"wrote {output}")
    return made


def _rewrite(subject: "Subject", loaded: "LoadedWeights", made: "RecalibratedNetwork", output: Path) -> None:
    """Write a file of the same kind, in which only running statistics that were measured differ."""
    from bncli.checkpoints import rewrite, statistics_in_file

    layers = [layer.name for layer in made.recalibration.layers]
    names = [f"{layer}.{leaf}".lstrip(".") for layer in layers for leaf in ("running_mean", "running_var")]
    absent = [name for name in names if name not in loaded.names]
    if absent:
        print_note(f"not written, as they are not in {subject.path}: {list_names(absent)}")
    buffers = statistics_in_file(subject.model, loaded, layers)
    rewrite(subject.path, output, buffers, loaded.key)


def _verify(
    subject: "Subject", dataset: "Dataset", how: "Calibration", max_error: float, ranks: "Ranks"
) -> "Verification":
    from bncli.cli.progress import ProgressReporter
    from bncli.training import verify_checkpoint, verify_network

    size = subject.config.runtime.eval_batch_size
    with ProgressReporter() as progress:
        if subject.named is None:
            return verify_checkpoint(
                subject.checkpoint,
                dataset,
                subject.runtime,
                how,
                eval_batch_size=size,
                max_error=max_error,
                ranks=ranks,
                progress=progress,
            )
        return verify_network(
            subject.model,
            dataset,
            subject.runtime,
            how,
            eval_batch_size=size,
            max_error=max_error,
            ranks=ranks,
            progress=progress,
        )


def _reopen(path: Path, subject: "Subject", dataset: "Dataset") -> "Subject":
    """The new checkpoint as any other command will see it."""
    if subject.named is not None:
        return open_again(subject, path, dataset, classifies=False)  # verified, not evaluated
    from bncli.checkpoints import load_checkpoint

    name = subject.checkpoint.config.model.name
    return replace(subject, path=path, own=load_checkpoint(path, model=name))


def _as_written(subject: "Subject", made: "RecalibratedNetwork") -> "Subject":
    """The same where another process wrote it, perhaps on another machine: the same tensors, from memory."""
    from bncli.training import RecalibratedCheckpoint

    return replace(subject, own=made.checkpoint) if isinstance(made, RecalibratedCheckpoint) else subject
