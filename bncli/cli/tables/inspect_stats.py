"""The output of `bncli inspect-stats`."""

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor

from bncli.batchnorm import Finding, LayerStats, summarize
from bncli.batchnorm.conventions import PYTORCH
from bncli.cli.tables.findings import show_findings
from bncli.cli.tables.layer_table import GAP, MIN_NAME, column_widths, show_layer_table
from bncli.cli.tables.table import aligned, console_for_results, number, print_wrapped, table_of

UNKNOWN = "unknown"  # momentum and eps in a state dict
MAX_EXCEPTIONS = 3  # layers that are named beside the others' value; more of them have a column
MAX_ROWS = 200  # more are shown only when asked for
DROPPED_FIRST = (
    "weight\nmin, max",
    "eps",
    "momentum",
    "num_batches\n_tracked",
    "channels",
    "running_mean\nmin, median, max",
)


def describe_layers(
    checkpoint: str,
    layers: Sequence[LayerStats],
    findings: Sequence[Finding],
    dead: Sequence[Finding],
    *,
    channels: bool,
) -> dict[str, Any]:
    """The JSON document of `bncli inspect-stats`; `dead` is what the rule dead_channel found."""
    flags = flags_of(findings)
    dead_channels = {finding.layer: finding.channels for finding in dead}
    number = Counter(finding.severity for finding in findings)
    return {
        "checkpoint": checkpoint,
        "num_layers": len(layers),
        "num_errors": number["error"],
        "num_warnings": number["warning"],
        "num_infos": number["info"],
        "layers": [
            {
                **_describe_layer(layer, channels=channels),
                "flags": flags[layer.name],
                "dead_channels": dead_channels.get(layer.name, ()),
            }
            for layer in layers
        ],
        "findings": findings,
    }


def flags_of(findings: Sequence[Finding]) -> dict[str, list[str]]:
    """Per layer, the names of the rules that found something in it."""
    flags: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        flags[finding.layer].append(finding.name)
    return flags


def _describe_layer(layer: LayerStats, *, channels: bool) -> dict[str, Any]:
    tensors = {
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "weight": layer.weight,
        "bias": layer.bias,
    }
    described: dict[str, Any] = {
        "name": layer.name,
        "num_features": layer.num_features,
        "num_batches_tracked": layer.num_batches_tracked,
        "momentum": layer.momentum,
        "eps": layer.eps,
        "hyperparameters_known": layer.hyperparameters_known,
        "framework": layer.convention.framework,
        "framework_momentum": layer.framework_momentum,
        "variance": layer.convention.variance,
        **{name: summarize(tensor) for name, tensor in tensors.items()},
    }
    if channels:
        described["channels"] = tensors
    return described


def show_layers(
    headline: str,
    layers: Sequence[LayerStats],
    findings: Sequence[Finding],
    *,
    num_rules: int,
    everything: bool = False,
    infos: bool = False,
) -> None:
    """The headline, one row per BatchNorm layer, then the findings."""
    console = console_for_results()
    flags = flags_of([finding for finding in findings if finding.severity != "info"])
    shown = list(layers)
    if len(layers) > MAX_ROWS and not everything:
        shown = sorted(layers, key=lambda layer: layer.name not in flags)[:MAX_ROWS]
    print_wrapped(console, headline, style="bold")
    shared = _shared(layers)
    _show_shared(console, shared)
    for line in _describe_conventions(layers):
        print_wrapped(console, line)
    styles = ["bold red" if layer.name in flags else None for layer in shown]
    show_layer_table(console, [layer.name for layer in shown], _columns(console, shown, set(shared)), styles)
    if len(shown) < len(layers):
        console.print(f"{len(shown)} of {len(layers):,} layers, those with findings first; --all shows all.")
    console.print()
    show_findings(console, findings, num_rules=num_rules, everything=everything, infos=infos)


@dataclass(frozen=True)
class _Shared:
    """What all layers have in common, or all but a few."""

    value: str
    others: dict[str, str]  # by layer


def _shared(layers: Sequence[LayerStats]) -> dict[str, _Shared]:
    """By name; what differs in more layers needs a column."""
    found = {}
    for name, text in SETTINGS.items():
        values = {layer.name: text(layer) for layer in layers}
        value, number = Counter(values.values()).most_common(1)[0]
        others = {layer: other for layer, other in values.items() if other != value}
        if number == len(layers) or (len(others) <= MAX_EXCEPTIONS and 2 * len(others) < number):
            found[name] = _Shared(value, others)
    return found


def _show_shared(console: Console, shared: Mapping[str, _Shared]) -> None:
    everywhere = [f"{name} {one.value}" for name, one in shared.items() if not one.others]
    known = [text for text in everywhere if not text.endswith(UNKNOWN)]
    unknown = [name for name, one in shared.items() if not one.others and one.value == UNKNOWN]
    if known:
        print_wrapped(console, f"In every layer: {', '.join(known)}")
    if unknown:
        print_wrapped(console, f"Not in the file: {', '.join(unknown)}")
    for name, one in shared.items():
        if one.others:
            others = ", ".join(f"{value} in {layer}" for layer, value in one.others.items())
            print_wrapped(console, f"In most layers: {name} {one.value} (but {others})")


_VARIANCES = {
    "biased": "running_var averages biased variances",
    "unbiased for images": "running_var averages unbiased variances of images, biased ones of vectors",
    "biased or unbiased": "running_var averages biased or unbiased variances, which the file does not say",
}


def _describe_conventions(layers: Sequence[LayerStats]) -> list[str]:
    """What the numbers of other frameworks mean beside PyTorch's, a line for each framework."""
    lines = []
    for convention in dict.fromkeys(layer.convention for layer in layers):
        if convention is PYTORCH:
            continue
        parts = []
        if convention.momentum_weighs == "old average":
            own = [layer for layer in layers if layer.convention is convention]
            known = {layer.momentum for layer in own if layer.hyperparameters_known} - {None}
            if len(known) == 1 and (momentum := known.pop()) is not None:
                text = f"{convention.translate_momentum(momentum):g} is {momentum:g} here"
            else:
                text = "is 1 minus the one here"
            parts.append(f"its {convention.momentum_name} {text}")
        if convention.variance in _VARIANCES:
            parts.append(_VARIANCES[convention.variance])
        lines.append(f"From {convention.framework}" + (f": {'; '.join(parts)}" if parts else ""))
    return lines


def _columns(console: Console, shown: Sequence[LayerStats], without: Container[str]) -> dict[str, list[str]]:
    """Header to cells."""
    weights = [summarize(layer.weight) for layer in shown]
    columns = {
        "channels": [str(layer.num_features) for layer in shown],
        **{
            name.replace("_tracked", "\n_tracked"): [text(layer) for layer in shown]
            for name, text in SETTINGS.items()
            if name not in without
        },
        "running_mean\nmin, median, max": _three_columns([layer.running_mean for layer in shown]),
        "running_var\nmin, median, max": _three_columns([layer.running_var for layer in shown]),
        "weight\nmin, max": aligned(
            [["-", "-"] if w is None else [number(w.min), number(w.max)] for w in weights]
        ),
    }
    return _fitting(console, columns)


def _fitting(console: Console, columns: dict[str, list[str]]) -> dict[str, list[str]]:
    """As many columns as a narrow terminal has room for; says which found none."""
    kept = dict(columns)
    for name in DROPPED_FIRST:
        if MIN_NAME + sum(width + GAP for width in column_widths(kept)) > console.width:
            kept.pop(name, None)
    if lost := [name.split("\nm")[0].replace("\n", "") for name in columns if name not in kept]:
        print_wrapped(console, f"Left out, as {console.width} columns are too few: {', '.join(lost)}")
    return kept


def _count(number: int | None) -> str:
    return UNKNOWN if number is None else f"{number:,}"


def _momentum(layer: LayerStats) -> str:
    if not layer.hyperparameters_known:
        return UNKNOWN
    return "cumulative" if layer.momentum is None else f"{layer.momentum:g}"


def _eps(layer: LayerStats) -> str:
    return UNKNOWN if layer.eps is None else f"{layer.eps:g}"


SETTINGS: dict[str, Callable[[LayerStats], str]] = {
    "num_batches_tracked": lambda layer: _count(layer.num_batches_tracked),
    "momentum": _momentum,
    "eps": _eps,
}


def _three_columns(tensors: Sequence[Tensor | None]) -> list[str]:
    """Minimum, median and maximum of each, aligned among themselves: narrower than three columns."""
    summaries = [summarize(tensor) for tensor in tensors]
    rows = [[number(s.min), number(s.median), number(s.max)] if s else ["-"] * 3 for s in summaries]
    return aligned(rows)


def show_channels(
    layers: Sequence[LayerStats],
    findings: Sequence[Finding],
    *,
    num_rules: int,
    everything: bool = False,
    infos: bool = False,
) -> None:
    """One table per layer with one row per channel, then the findings."""
    console = console_for_results()
    codes: dict[tuple[str, int], list[str]] = defaultdict(list)
    for finding in findings:
        for channel in finding.channels:
            codes[finding.layer, channel].append(finding.code)
    for layer in layers:
        own = layer.framework_momentum
        said = "" if own in (None, layer.momentum) else f" ({own:g} in {layer.convention.framework})"
        text = f"{layer.name}: momentum {_momentum(layer)}{said}, eps {_eps(layer)}"
        print_wrapped(console, text, style="bold")
        table = table_of(
            None,
            "channel",
            "running_mean",
            "running_var",
            "weight",
            "bias",
            "findings",
            left=0,
        )
        tensors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        columns = [[None] * layer.num_features if t is None else t.tolist() for t in tensors]
        for channel, values in enumerate(zip(*columns, strict=True)):
            numbers = ("-" if value is None else f"{value:.4g}" for value in values)
            table.add_row(str(channel), *numbers, " ".join(codes[layer.name, channel]))
        console.print(table)
        console.print()
    show_findings(console, findings, num_rules=num_rules, everything=everything, infos=infos)
