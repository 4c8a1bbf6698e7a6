"""`bncli inspect-stats`: the running statistics of a checkpoint, and what is wrong with them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bncli.cli.audit_options import (
    AUDIT_FLAGS,
    AllOption,
    AssumeOption,
    ExplainOption,
    FailOnOption,
    IgnoreOption,
    SelectOption,
    SortOption,
    ThresholdOption,
    assume,
    fails,
    parse_assumed,
    parse_rules,
    parse_thresholds,
    refuse_options,
    sort_layers,
)
from bncli.cli.messages import print_note
from bncli.cli.options import (
    ANY_CHECKPOINT,
    ChannelsOption,
    CsvOption,
    JsonOption,
    KeyOption,
    LayerOption,
    PlotOption,
    matching_layers,
)
from bncli.errors import ConfigError, NoBatchNormError
from bncli.wording import list_names, plural

if TYPE_CHECKING:
    from bncli.batchnorm import LayerStats
    from bncli.checkpoints import OpenCheckpoint


def inspect_stats(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(metavar="CHECKPOINT", help=ANY_CHECKPOINT),
    ] = None,
    layer: LayerOption = None,
    channels: ChannelsOption = False,
    plot: PlotOption = None,
    csv: CsvOption = None,
    key: KeyOption = None,
    select: SelectOption = None,
    ignore: IgnoreOption = None,
    fail_on: FailOnOption = "error",
    threshold: ThresholdOption = None,
    assumed: AssumeOption = None,
    sort: SortOption = "model",
    show_all: AllOption = False,
    explain: ExplainOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show running statistics of every layer, and what is wrong.

    The file is only read; it need not be one of bncli. Exit code 1 if something is wrong. `bncli compare`
    shows what differs between two checkpoints, `bncli history` what a run recorded.

    Examples:
    bncli inspect-stats runs/first/last.pt
    bncli inspect-stats runs/first/last.pt --layer 'stages.1.*' --channels
    bncli inspect-stats --explain dead_channel
    """
    if explain is not None:
        return _explain(context, explain, as_json=as_json)
    if source is None:
        raise ConfigError("inspect-stats", ["give a CHECKPOINT, or --explain RULE"])
    _refuse_what_others_read(source, context.args)
    from bncli.batchnorm.audit.audit_layers import audit_layers, check_thresholds, selected_rules
    from bncli.cli.tables.csv_rows import STDOUT, check_results, layer_rows, write_csv
    from bncli.cli.tables.inspect_stats import describe_layers, show_channels, show_layers
    from bncli.cli.tables.table import print_json

    check_results(csv, plot, source, as_json=as_json)
    _tell_exported(source)
    rules = selected_rules(parse_rules(select), parse_rules(ignore) or [])
    limits = check_thresholds(parse_thresholds(threshold))
    assumptions = parse_assumed(assumed)
    layers, checkpoint = _read_layers(source, key)
    layers = assume(layers, assumptions)
    # all layers, before --layer: their counters are compared with each other
    everything = audit_layers(layers, thresholds=limits)
    codes = {rule.code for rule in rules}
    findings = tuple(finding for finding in everything if finding.code in codes)
    if layer is not None:
        layers = list(matching_layers(layers, layer))
        shown = {item.name for item in layers}
        findings = tuple(finding for finding in findings if finding.layer in shown)
    layers = sort_layers(layers, findings, sort)
    if plot is not None:
        from bncli.cli.plots.inspect_stats import plot_running_stats

        # infos are not marked, as they are not listed below the table, unless asked for by name
        marked = [finding for finding in findings if select is not None or finding.severity != "info"]
        plot_running_stats(layers, marked, plot)
        print_note(f"wrote {plot}")
    if csv is not None:
        write_csv(layer_rows(layers, findings, channels=channels), csv)
    if as_json:
        # a fact about the layer, whether or not the rule is asked for
        dead = [finding for finding in everything if finding.name == "dead_channel"]
        described = describe_layers(source, layers, findings, dead, channels=channels)
        described |= {name: getattr(checkpoint, name) for name in ("kind", "key", "candidates", "notes")}
        print_json({**described, "num_tensors": len(checkpoint.tensors)})
    elif csv == STDOUT:
        pass
    elif channels:
        show_channels(layers, findings, num_rules=len(rules), everything=show_all, infos=select is not None)
    else:
        in_words = plural(len(checkpoint.layer_names), "BatchNorm layer")
        headline = f"{source}: found {in_words} in {plural(len(checkpoint.tensors), 'tensor')}"
        # a rule that was asked for by name is shown, whatever its severity
        show_layers(
            headline, layers, findings, num_rules=len(rules), everything=show_all, infos=select is not None
        )
    return 1 if fails(findings, fail_on) else 0


def _tell_exported(source: str) -> None:
    """Say what `bncli export` did to the layers of its file. Raises CheckpointError where none is left."""
    from bncli.export.exported_file import exported_record

    record = exported_record(Path(source))
    if record is None or not record.folded:
        return
    which = list_names([f"{name} into {into}" for name, into in record.folded], 3)
    if not record.kept:
        raise NoBatchNormError(
            f"{source}: `bncli export` folded all {plural(len(record.folded), 'BatchNorm layer')} away"
            f" ({which}); give {record.origin}, which it was exported from"
        )
    print_note(f"{source}: {record.sentence} by `bncli export` ({which})")


def _refuse_what_others_read(source: str, more: list[str]) -> None:
    """Raise ConfigError for more than one checkpoint and for the directory of a run: others read these."""
    path = Path(source)
    if more:
        text = (
            f"it reads one checkpoint; to compare two use bncli compare {source} {more[0]}; the files of"
            " several processes of one training: bncli compare --ranks"
        )
    elif path.is_dir() and any((path / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        text = (
            f"{path} is the directory of a run; use bncli history {path}, or inspect-stats {path / 'last.pt'}"
        )
    else:
        return
    raise ConfigError("inspect-stats", [text])


def _explain(context: typer.Context, wanted: str, *, as_json: bool) -> int:
    unused = AUDIT_FLAGS | {"--layer", "--channels", "--plot", "--csv", "--key"}
    refuse_options(
        context, unused, f"--explain {wanted}", "no effect here, where no checkpoint is read; leave it out"
    )
    from bncli.batchnorm.audit.rule_pages import PAGES, find_page
    from bncli.cli.explain.topics import topic_of_rule
    from bncli.cli.tables.explain import show_topics
    from bncli.cli.tables.table import print_json

    pages = PAGES if wanted == "all" else (find_page(wanted),)
    if as_json:
        print_json({"rules": [page.describe() for page in pages]})
    else:
        show_topics([topic_of_rule(page) for page in pages])
    return 0


def _read_layers(source: str, key: str | None) -> "tuple[list[LayerStats], OpenCheckpoint]":
    """The layers, and the checkpoint they come from, closed again: its numbers are read."""
    from bncli.checkpoints import open_checkpoint

    with open_checkpoint(source, key) as checkpoint:
        layers = list(checkpoint.layers())
    keys = [candidate.key for candidate in checkpoint.candidates]
    if len(keys) > 1 and key is None:
        listed = ", ".join(name or "the top" for name in keys[:8])
        print_note(
            f"BatchNorm layers lie under {listed}; these are the ones of {checkpoint.key or 'the top'}"
            " (--key KEY shows others)"
        )
    for note in checkpoint.notes:
        print_note(note)
    return layers, checkpoint
