"""What is wrong with the BatchNorm layers of a network, judged from their numbers alone.

A finding is a claim about a layer as it is; a healthy trained network has none but infos. The rules are in
`rules.py`, a function each.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from bncli.batchnorm.audit.channels import network_of
from bncli.batchnorm.audit.rule_definition import Hit, Rule, Severity, Values
from bncli.batchnorm.audit.rule_pages import RECALIBRATE
from bncli.batchnorm.audit.rules import DEFAULT_THRESHOLDS, RULES, find_rule
from bncli.batchnorm.layers import LayerStats
from bncli.errors import BncliError


@dataclass(frozen=True)
class Finding:
    """What one rule found in one layer."""

    code: str
    name: str
    severity: Severity  # of this hit, which may be below the rule's
    layer: str
    channels: tuple[int, ...]  # empty: the layer as a whole
    values: Values  # the numbers found
    thresholds: dict[str, float]  # what they were compared with
    message: str  # one line, with the numbers
    advice: str  # what to do, by what is known of this layer

    def __str__(self) -> str:
        """What was found where, and what to do."""
        where = self.layer or "the module itself"
        return f"{self.code} {self.severity} in {where}: {self.message}. {self.advice}"


def audit_layers(
    layers: Sequence[LayerStats],
    *,
    thresholds: Mapping[str, float] | None = None,
    select: Collection[str] | None = None,
    ignore: Collection[str] = (),
) -> tuple[Finding, ...]:
    """Judge layers by the rules: by code, then in the order of the layers.

    Give it all layers of a network: their counters are compared with each other. `select` (default: all
    rules) and `ignore` take codes or names, `thresholds` replaces defaults by name.

    Raises BncliError for a rule or threshold that does not exist, and for a threshold that is no number.
    """
    limits = DEFAULT_THRESHOLDS | check_thresholds(thresholds or {})
    network = network_of(layers)
    return tuple(
        _finding(rule, hit, layers[hit.index], limits)
        for rule in selected_rules(select, ignore)
        for hit in rule.find(network, limits)
    )


def selected_rules(select: Collection[str] | None = None, ignore: Collection[str] = ()) -> tuple[Rule, ...]:
    """The rules that remain, by code.

    Raises BncliError for a code or name that does not exist.
    """
    chosen = RULES if select is None else [find_rule(name) for name in select]
    dropped = [find_rule(name) for name in ignore]
    return tuple(rule for rule in RULES if rule in chosen and rule not in dropped)


def check_thresholds(thresholds: Mapping[str, float]) -> dict[str, float]:
    """The thresholds, if all of them exist and are numbers.

    Raises BncliError otherwise.
    """
    for name, value in thresholds.items():
        if name not in DEFAULT_THRESHOLDS:
            raise BncliError(f"there is no threshold {name!r}; there are {', '.join(DEFAULT_THRESHOLDS)}")
        if not value >= 0:
            raise BncliError(f"threshold {name}: expected a number of 0 or more, found {value!r}")
    return dict(thresholds)


def _finding(rule: Rule, hit: Hit, layer: LayerStats, limits: Mapping[str, float]) -> Finding:
    where = f"{_channels(hit.channels, layer.num_features)}: " if hit.channels else ""
    return Finding(
        code=rule.code,
        name=rule.name,
        severity=hit.severity or rule.severity,
        layer=layer.name,
        channels=hit.channels,
        values=hit.values,
        thresholds={threshold.name: limits[threshold.name] for threshold in rule.thresholds},
        message=where + hit.text,
        advice=(hit.advice or rule.advice).replace(RECALIBRATE, f"({layer.convention.remeasured_by})"),
    )


def _channels(numbers: tuple[int, ...], num_features: int) -> str:
    if len(numbers) == 1:
        return f"channel {numbers[0]} of {num_features}"
    if len(numbers) == num_features:
        return f"all {num_features} channels"
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"{len(numbers)} of {num_features} channels ({shown})"
