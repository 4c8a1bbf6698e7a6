"""The options of the audit, and how their values are read."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bncli.cli.help_page import CHECKED, SHOWN
from bncli.cli.messages import print_note
from bncli.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from bncli.batchnorm import Finding, LayerStats

FailOn = Literal["error", "warning", "never"]
SortBy = Literal["model", "name", "findings", "gain", "mean", "variance"]


def complete_rule(incomplete: str) -> list[tuple[str, str]]:
    """For the shell: the last of the rules between commas, with what the rule finds."""
    from bncli.batchnorm.audit.rule_pages import PAGES

    before, comma, _ = incomplete.rpartition(",")
    return [(f"{before}{comma}{name}", page.summary) for page in PAGES for name in (page.code, page.name)]


SelectOption = Annotated[
    str | None,
    typer.Option(
        "--select",
        metavar="RULES",
        help="Check only these rules, by code or name, as in BN003,dead_channel.",
        rich_help_panel=CHECKED,
        autocompletion=complete_rule,
    ),
]
IgnoreOption = Annotated[
    str | None,
    typer.Option(
        "--ignore",
        metavar="RULES",
        help="Check all rules but these.",
        rich_help_panel=CHECKED,
        autocompletion=complete_rule,
    ),
]
FailOnOption = Annotated[
    FailOn,
    typer.Option(
        "--fail-on",
        metavar="SEVERITY",
        help="Exit with 1 on findings that are at least this severe: error, warning or never.",
        rich_help_panel=CHECKED,
    ),
]
ExplainOption = Annotated[
    str | None,
    typer.Option(
        "--explain",
        metavar="RULE",
        help="Explain a rule, by code or name, or all of them; needs no CHECKPOINT.",
        rich_help_panel=CHECKED,
        autocompletion=complete_rule,
    ),
]
ThresholdOption = Annotated[
    list[str] | None,
    typer.Option(
        "--threshold",
        metavar="NAME=VALUE",
        help="Change a limit of a rule, as in gain=50; can be repeated.",
        rich_help_panel=CHECKED,
    ),
]
SortOption = Annotated[
    SortBy,
    typer.Option(
        "--sort",
        metavar="ORDER",
        help="model (as in the network), name, or the worst layer first: findings (most of them), gain"
        " (largest), mean (farthest from 0) or variance (smallest).",
        rich_help_panel=SHOWN,
    ),
]
AssumeOption = Annotated[
    str | None,
    typer.Option(
        "--assume",
        metavar="NAME=VALUE",
        help="What the file does not say, as in eps=1e-3,momentum=0.01: eps, and momentum as the weight of"
        " the new batch (0.01 is the 0.99 of Keras). Layers that have their own keep it.  [default: what the"
        " framework has by default]",
        rich_help_panel=CHECKED,
    ),
]
AllOption = Annotated[
    bool,
    typer.Option("--all", help="Show every layer and every finding, also mere infos.", rich_help_panel=SHOWN),
]
AUDIT_FLAGS = frozenset({"--select", "--ignore", "--fail-on", "--threshold", "--assume", "--sort", "--all"})


def refuse_options(context: typer.Context, flags: Collection[str], what: str, reason: str) -> None:
    """Raise ConfigError if one of them was given where it would change nothing."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.opts[0] in flags
        and parameter.name is not None
        and (origin := context.get_parameter_source(parameter.name)) is not None
        and origin.name != "DEFAULT"
    ]
    if given:
        raise ConfigError(what, [f"{', '.join(given)}: {reason}"])


def parse_rules(text: str | None) -> list[str] | None:
    """The codes or names between commas; None for no option."""
    return None if text is None else [part for part in text.split(",") if part.strip()]


def parse_thresholds(items: Sequence[str] | None) -> dict[str, float]:
    """Limits by name.

    Raises ConfigError for anything but NAME=NUMBER.
    """
    found = {}
    for item in items or ():
        name, _, value = item.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(
                "--threshold", [f"expected NAME=NUMBER such as gain=50, found {item!r}"]
            ) from None
    return found


def parse_assumed(text: str | None) -> dict[str, float]:
    """`eps` and `momentum`, as far as they are given.

    Raises ConfigError for other names, and for values that none can have.
    """
    found: dict[str, float] = {}
    for item in (text or "").split(",") if text is not None else ():
        name, _, value = (part.strip() for part in item.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in ("eps", "momentum") or not 0 <= number <= 1 or (name == "eps" and number == 0):
            raise ConfigError(
                "--assume",
                [
                    f"expected eps=NUMBER or momentum=NUMBER between 0 and 1, such as eps=1e-3,momentum=0.01,"
                    f" found {item.strip()!r}"
                ],
            )
        found[name] = number
    if found.get("momentum", 0) > 0.5:
        momentum = found["momentum"]
        print_note(
            f"--assume momentum={momentum:g} is the weight of the new batch; if {momentum:g} is that of the"
            f" old average, as in Keras and Flax, give momentum={1 - momentum:.3g}"
        )
    return found


def assume(layers: "Sequence[LayerStats]", assumed: Mapping[str, float]) -> "list[LayerStats]":
    """The layers, with what is assumed where their file says nothing."""
    from dataclasses import replace

    from bncli.batchnorm.conventions import EQUINOX

    changed = []
    for layer in layers:
        new: dict[str, Any] = {}
        if "eps" in assumed and layer.eps is None:
            new["eps"] = assumed["eps"]
        if "momentum" in assumed and not layer.hyperparameters_known and not layer.is_frozen:
            new |= {"momentum": assumed["momentum"], "hyperparameters_known": True}
            if layer.convention == EQUINOX and layer.num_batches_tracked:
                new |= _divided_by(layer, assumed["momentum"])
        changed.append(replace(layer, **new) if new else layer)
    return changed


def _divided_by(layer: "LayerStats", momentum: float) -> "dict[str, Tensor]":
    """Equinox evaluates with its averages divided by 1 - (old average's weight)^count: by this one's now."""
    count = layer.num_batches_tracked or 0
    factor = (1 - (1 - layer.convention.new_batch_weight) ** count) / (1 - (1 - momentum) ** count or 1)
    tensors = {"running_mean": layer.running_mean, "running_var": layer.running_var}
    return {name: tensor * factor for name, tensor in tensors.items() if tensor is not None}


def fails(findings: "Sequence[Finding]", fail_on: FailOn) -> bool:
    """Whether a finding is at least as severe as asked for."""
    counted = {"error": {"error"}, "warning": {"error", "warning"}, "never": set[str]()}[fail_on]
    return any(finding.severity in counted for finding in findings)


def sort_layers(
    layers: "Sequence[LayerStats]", findings: "Sequence[Finding]", by: SortBy
) -> "list[LayerStats]":
    """The layers by name, or the worst first; layers without the quantity come last."""
    from collections import Counter

    from bncli.batchnorm.audit.channels import channels_of, gain, mean_in_deviations

    if by == "model":
        return list(layers)
    if by == "name":
        return sorted(layers, key=lambda layer: layer.name)
    if by == "findings":
        number = Counter(finding.layer for finding in findings)
        infos = Counter(finding.layer for finding in findings if finding.severity == "info")
        return sorted(layers, key=lambda layer: (infos[layer.name] - number[layer.name], -infos[layer.name]))
    channels = channels_of(layers)
    if by == "gain":
        quantity = gain(channels)
    else:
        quantity = mean_in_deviations(channels) if by == "mean" else -channels.running_var
    parts = quantity.nan_to_num(-math.inf).split([layer.num_features for layer in layers])
    worst = [float(part.max()) if len(part) else -math.inf for part in parts]
    order = sorted(range(len(layers)), key=lambda index: -worst[index])
    return [layers[index] for index in order]
