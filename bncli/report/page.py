"""The page as one HTML file: text and tables by a template that escapes, figures by a script from data.

Nothing is loaded from anywhere, and the page says so to the browser: its Content-Security-Policy allows the
scripts in it by their SHA-256 and forbids every request. So a name in somebody's checkpoint, which is text
everywhere, could not run or fetch anything even if it were not.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any

import jinja2
from markupsafe import Markup, escape

from bncli.batchnorm import Comparison, Finding, LayerComparison
from bncli.batchnorm.audit.rule_pages import find_page
from bncli.evaluation import RecordedChannel
from bncli.report.channel_data import SEVERITIES, describe_channels, describe_layers, rounded
from bncli.report.content import Content
from bncli.report.library import DrawingLibrary
from bncli.report.verdict import judge, remedy, state_of
from bncli.serialization import to_plain
from bncli.wording import one_line, plural

MAX_FINDINGS = 200  # of one rule, that the page can show
SOURCES_IN_WORDS = {  # of a gap's four scores
    "running": "running statistics, eval mode",
    "batch": "batch statistics",
    "precise": "measured anew, in one pass",
    "exact": "measured anew, layer by layer",
}
MAX_COMPARED = 2_000  # layers of two checkpoints in the page, those that moved farthest


def render_page(content: Content, library: DrawingLibrary) -> str:
    """The whole page.

    Raises BncliError when the drawing library could not be made.
    """
    data = _data(content)
    parts = {
        "content": content,
        "verdict": judge(content),
        "remedy": remedy(content),
        "state": state_of(content),
        "rules": data.pop("rules"),
        "num_shown_channels": len(data["channels"]["layers"]),
        "gap_sources": SOURCES_IN_WORDS,
        "configuration": _lines(content.configuration or ""),
        "data": Markup(_in_script(data)),
        "style": Markup(_asset("page.css")),
    }
    scripts = [library.script(), _asset("page.js")]
    parts["scripts"] = [Markup(script) for script in scripts]
    parts["allowed"] = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return _template().render(parts)


def _lines(text: str) -> Markup:
    """The text with its line breaks and margins, and without other control characters."""
    lines = [line[: len(line) - len(line.lstrip(" "))] + one_line(line) for line in text.splitlines()]
    return escape("\n".join(lines))


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_asset),
        finalize=lambda value: one_line(value) if type(value) is str else value,
    )
    environment.filters |= {
        "percent": lambda value: f"{value:.2%}",
        "number": lambda value: f"{value:.3g}".replace("-", "\N{MINUS SIGN}").replace("nan", "NaN"),
        "plural": plural,
        "sentence": _capitalised,
        "with_options": _with_options,
    }
    return environment.get_template("page.html")


def _with_options(text: str) -> Markup:
    """The words that are options of a command set as code, which a line's end does not break."""
    return Markup(
        re.sub(r"(?<!\S)--[a-z][a-z-]*", r'<code class="option">\g<0></code>', str(escape(one_line(text))))
    )


def _capitalised(text: str) -> str:
    """As a sentence begins, except with the name of a tensor."""
    return text if "_" in text.split(" ", 1)[0] else text[:1].upper() + text[1:]


def _asset(name: str) -> str:
    return (files("bncli.report") / "assets" / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _in_script(data: Mapping[str, Any]) -> str:
    """JSON that no name in it can end: ASCII, without `<`."""
    return json.dumps(to_plain(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _data(content: Content) -> dict[str, Any]:
    """What the script reads; `rules` is what the template reads of the findings."""
    layers = content.layers
    index_of = {layer.name: index for index, layer in enumerate(layers)}
    rules = _rules(content.findings, index_of)
    measured = content.measurement
    return {
        "layers": describe_layers(layers, content.findings),
        "channels": describe_channels(layers, content.findings, first=_subjects(content)),
        "findings": [rule.pop("findings") for rule in rules],
        "rules": rules,
        "training": None if content.training is None else _training(content.training.epochs),
        "history": None if content.convergence is None else _history(content),
        "comparison": None if content.comparison is None else _comparison(content),
        "sweep": None if measured is None else measured.sweep,
        "gap": None if measured is None else _gap(content),
        "channel": None if measured is None else _channel(measured.channel),
    }


def _subjects(content: Content) -> list[str]:
    """The layers that the page is about: those that images put the blame on, or that moved farthest."""
    names: list[str] = []
    if content.measurement is not None:
        gap = content.measurement.gap
        tried = [layer.name for layer in gap.layers if layer.recovered is not None]
        names += [*([gap.worst_layer] if gap.worst_layer else []), content.measurement.channel.layer, *tried]
    if content.comparison is not None:
        names += [layer.name_in_second for layer in _farthest_moved(content.comparison)]
    return list(dict.fromkeys(names))


def _rules(findings: Sequence[Finding], index_of: Mapping[str, int]) -> list[dict[str, Any]]:
    """By rule, the gravest first."""

    def gravity(finding: Finding) -> tuple[int, str]:
        return SEVERITIES.index(finding.severity), finding.code

    rules = []
    for (_, code), group in groupby(sorted(findings, key=gravity), key=gravity):
        alike = list(group)
        page = find_page(code)
        rules.append(
            {
                "code": code,
                "name": alike[0].name,
                "severity": alike[0].severity,
                "summary": page.summary,
                "cost": page.cost,
                "number": len(alike),
                "first": alike[0],
                "findings": [_finding(one, index_of[one.layer]) for one in alike[:MAX_FINDINGS]],
                "left_out": max(0, len(alike) - MAX_FINDINGS),
            }
        )
    return rules


def _finding(finding: Finding, layer: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "channels": finding.channels,
        "message": one_line(finding.message),
        "advice": one_line(finding.advice),
    }


def _training(epochs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate")
    return {key: [rounded(epoch.get(key)) for epoch in epochs] for key in keys}


def _history(content: Content) -> list[dict[str, Any]]:
    assert content.convergence is not None
    return [
        {
            "name": one_line(layer.name),
            "epoch": [point.epoch for point in layer.epochs],
            "shift": [rounded(point.mean_shift_in_batch_deviations) for point in layer.epochs],
            "ratio": [rounded(point.var_ratio) for point in layer.epochs],
        }
        for layer in content.convergence.layers
    ]


def _farthest_moved(comparison: Comparison) -> list[LayerComparison]:
    layers = [layer for layer in comparison.layers if layer.summary is not None]
    return sorted(layers, key=lambda layer: -((layer.summary and layer.summary.kl) or 0.0))[:MAX_COMPARED]


def _comparison(content: Content) -> dict[str, list[Any]]:
    assert content.comparison is not None
    kept = {layer.name for layer in _farthest_moved(content.comparison)}
    rows = [
        (layer, layer.summary)
        for layer in content.comparison.layers
        if layer.name in kept and layer.summary is not None
    ]
    return {
        "name": [one_line(layer.name) for layer, _ in rows],
        "shift": [rounded(found.mean_shift_in_first_deviations) for _, found in rows],
        "ratio": [rounded(found.var_ratio) for _, found in rows],
        "kl": [rounded(found.kl) for _, found in rows],
        "channel": [found.max_kl_channel for _, found in rows],
        "statistics": [layer.statistics_moved for layer, _ in rows],
        "weights": [layer.weights_moved or bool(layer.feeding_weights_moved) for layer, _ in rows],
    }


def _gap(content: Content) -> dict[str, Any]:
    assert content.measurement is not None
    gap = content.measurement.gap
    return {
        "scores": [
            {"name": SOURCES_IN_WORDS[name], "accuracy": rounded(score.accuracy), "loss": rounded(score.loss)}
            for name, score in gap.scores().items()
        ],
        "worst": gap.worst_layer and one_line(gap.worst_layer),
        "layers": [
            {
                "name": one_line(layer.name),
                "score": rounded(layer.self_consistency),
                "shift": rounded(layer.mean_shift_in_input_deviations),
                "ratio": rounded(layer.var_ratio),
                "recovered": rounded(layer.recovered),
            }
            for layer in gap.layers
        ],
    }


def _channel(found: RecordedChannel) -> dict[str, Any]:
    tensors = {"values": found.values, "means": found.means, "variances": found.variances}
    return {
        "layer": one_line(found.layer),
        "channel": found.channel,
        "num_positions": found.num_positions,
        **{name: [rounded(value) for value in tensor.tolist()] for name, tensor in tensors.items()},
        "population_mean": rounded(found.population_mean),
        "population_variance": rounded(found.population_variance),
        "running_mean": rounded(found.running_mean),
        "running_var": rounded(found.running_var),
        "momentum": found.momentum,
        "tracked": found.num_batches_tracked,
    }
