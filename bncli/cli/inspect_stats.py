"""`bncli inspect-stats`: the running statistics of a checkpoint, and what is wrong with them."""

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bncli.cli.audit_options import (
    AllOption,
    ExplainOption,
    FailOnOption,
    IgnoreOption,
    SelectOption,
    SortOption,
    ThresholdOption,
    fails,
    parse_rules,
    parse_thresholds,
    sort_layers,
)
from bncli.cli.messages import print_note
from bncli.cli.options import JsonOption
from bncli.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from bncli.stats import LayerStats


def inspect_stats(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CHECKPOINT", help="Any file with a state dict.", show_default=False),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only layers of such names, as in 'stages.1.*'.")
    ] = None,
    channels: Annotated[bool, typer.Option("--channels", help="Show every channel of them.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the distributions to a .png or .svg file.")
    ] = None,
    select: SelectOption = None,
    ignore: IgnoreOption = None,
    fail_on: FailOnOption = "error",
    threshold: ThresholdOption = None,
    sort: SortOption = "model",
    show_all: AllOption = False,
    explain: ExplainOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show the running statistics of every BatchNorm layer, and what is wrong with them.

    The file is only read. Exits with 1 if something is wrong; --explain all lists what can be.
    """
    if explain is not None:
        return _explain(explain, as_json=as_json)
    if checkpoint is None:
        raise ConfigError("inspect-stats", ["give a CHECKPOINT, or --explain RULE"])
    from bncli.cli.render import print_json
    from bncli.cli.render_layers import describe_layers, show_channels, show_layers
    from bncli.stats.audit import audit, check_thresholds, selected_rules

    chosen, ignored = parse_rules(select), parse_rules(ignore) or []
    rules = selected_rules(chosen, ignored)
    limits = check_thresholds(parse_thresholds(threshold))
    layers = _read_layers(checkpoint)
    # all layers, before --layer: their counters are compared with each other
    findings = audit(layers, thresholds=limits, select=chosen, ignore=ignored)
    if layer is not None:
        found = [item for item in layers if fnmatch.fnmatchcase(item.name, layer)]
        if not found:
            names = ", ".join(item.name for item in layers)
            raise ConfigError("--layer", [f"no BatchNorm layer matches {layer!r}; there are {names}"])
        layers = found
        shown = {item.name for item in found}
        findings = tuple(finding for finding in findings if finding.layer in shown)
    layers = sort_layers(layers, findings, sort)
    if plot is not None:
        from bncli.cli.plot import plot_running_stats

        plot_running_stats(layers, plot)
        print_note(f"wrote {plot}")
    if as_json:
        print_json(describe_layers(str(checkpoint), layers, findings, channels=channels))
    elif channels:
        show_channels(layers, findings, num_rules=len(rules), everything=show_all)
    else:
        show_layers(str(checkpoint), layers, findings, num_rules=len(rules), everything=show_all)
    return 1 if fails(findings, fail_on) else 0


def _explain(wanted: str, *, as_json: bool) -> int:
    from bncli.cli.render import print_json
    from bncli.cli.render_findings import show_explanation
    from bncli.stats import RULES, find_rule
    from bncli.stats.rules import describe_rule

    rules = RULES if wanted == "all" else (find_rule(wanted),)
    if as_json:
        print_json({"rules": [describe_rule(rule) for rule in rules]})
    else:
        show_explanation(rules)
    return 0


def _read_layers(path: Path) -> "list[LayerStats]":
    """From a checkpoint of bncli's with momentum and eps; from another state dict without them."""
    from collections.abc import Mapping

    from bncli.checkpoint import load_model, read_torch_file
    from bncli.checkpoint.format import FORMAT
    from bncli.stats import read_running_stats

    content = read_torch_file(path)
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        return list(read_running_stats(load_model(path)))
    if isinstance(content, Mapping):
        for state in (content, *(content.get(key) for key in ("state_dict", "model"))):
            layers = read_running_stats(state) if isinstance(state, Mapping) else ()
            if layers:
                return list(layers)
    raise CheckpointError(f"{path}: a torch file, but no BatchNorm layer with running statistics in it")
