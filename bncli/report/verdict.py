"""The first thing on the page: three sentences or so that say how it stands, and what to do."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from bncli.batchnorm import Comparison, Finding
from bncli.batchnorm.distance import nan_as_farthest
from bncli.evaluation import Gap
from bncli.evaluation.gap import INCONSISTENT, STALE, LayerGap
from bncli.report.content import Content, Training
from bncli.training.convergence import Convergence
from bncli.wording import list_names, one_line, plural

MOST = 0.9  # of what is to be gained: who gains that much alone is the only one to blame

Verdict = tuple[str, ...]
State = Literal["bad", "doubtful", "good"]


def judge(content: Content) -> Verdict:
    """What it is, whether its running statistics are right, and what was found; a paragraph each."""
    state = _state(content)
    return tuple(one_line(sentence) for sentence in (_subject(content), *state) if sentence)


def state_of(content: Content) -> State:
    """Bad: an error, or running statistics that cost accuracy. Doubtful: a warning."""
    severities = {finding.severity for finding in content.findings}
    if "error" in severities or _is_stale(content):
        return "bad"
    return "doubtful" if "warning" in severities else "good"


def remedy(content: Content) -> str:
    """The command that repairs what the images showed to be wrong; else nothing."""
    return content.how_to_repair if _is_stale(content) else ""


def _is_stale(content: Content) -> bool:
    return content.measurement is not None and content.measurement.gap.batch_norm_is_to_blame


def _subject(content: Content) -> str:
    layers = plural(len(content.layers), "BatchNorm layer")
    channels = plural(sum(layer.num_features for layer in content.layers), "channel")
    has = f"{layers} with {channels}"
    if content.comparison is not None:
        return (
            f"Two checkpoints of one network, {has}: {content.comparison.verdict}{_moved(content.comparison)}"
        )
    found = content.measurement
    if found is not None:
        accuracy = found.gap.running.accuracy
        images = f"{found.gap.num_images:,} test images"
        return f"In eval mode the network is right on {accuracy:.1%} of {images}; it has {has}."
    if content.training is not None:
        return f"{_outcome(content.training)} It has {has}." if content.layers else _outcome(content.training)
    return f"{content.title} has {has}."


def _moved(comparison: Comparison) -> str:
    """How the layer differs whose statistics moved farthest; nothing where none did."""
    kl, layer = max(
        ((layer.summary.kl or 0.0, layer) for layer in comparison.layers if layer.summary is not None),
        key=lambda item: item[0],
        default=(0.0, None),
    )
    if layer is None or layer.summary is None or not kl > 0:
        return ""
    shift, ratio = layer.summary.mean_shift_in_first_deviations, layer.summary.var_ratio
    if shift is None or ratio is None:
        return ""
    return (
        f" In {layer.name_in_second} the second's running_var is {_short(ratio)} times the first's, and"
        f" running_mean moved by {_short(shift)} standard deviations."
    )


def _outcome(training: Training) -> str:
    last = training.epochs[-1]
    planned = training.planned_epochs
    of = f" of {planned}" if planned is not None and last["epoch"] < planned else ""
    after = f"After epoch {last['epoch']}{of} the network"
    accuracy = last.get("test_accuracy")
    if accuracy is None:
        return f"{after} was not evaluated."
    return f"{after} is right on {accuracy:.1%} of the test images in eval mode."


def _state(content: Content) -> list[str]:
    """Whether the statistics are right, and what to do."""
    measured = content.measurement
    grave = [finding for finding in content.findings if finding.severity != "info"]
    sentences = []
    if measured is not None:
        sentences.append(_measured(measured.gap))
    elif content.convergence is not None:
        sentences.append(f"{_followed(content.convergence)}{content.convergence.verdict}")
    if content.layers:
        sentences.append(_findings(content, grave))
    return sentences


def _followed(convergence: Convergence) -> str:
    """Whether the running statistics match the last epoch's batches; nothing where that is not known."""
    points = [layer.epochs[-1] for layer in convergence.layers]
    lags = [
        math.hypot(point.mean_shift_in_batch_deviations, math.log(point.var_ratio))
        for point in points
        if point.mean_shift_in_batch_deviations is not None and point.var_ratio
    ]
    if len(lags) < len(points):
        return ""
    if max(lags) < INCONSISTENT:
        return "Its running statistics have caught up with the batches. "
    return "Its running statistics do not match the last epoch's batches. "


def _measured(gap: Gap) -> str:
    """What the images say of the running statistics, in words for somebody who has not read about them."""
    anew = f"measured anew on {gap.num_calibration_images:,} training images"
    change = f"{100 * gap.explained.accuracy:+.1f} points"
    if gap.loss_is_to_blame:
        return (
            f"Its running statistics are wrong: with those {anew} its loss is {gap.exact.loss:.4g} instead of"
            f" {gap.running.loss:.4g}, though its accuracy does not show it ({change})."
        )
    if gap.batch_norm_is_to_blame:
        return (
            f"Its running statistics are wrong: with those {anew} it is right on {gap.exact.accuracy:.1%}."
            f" {_culprit(gap)}"
        )
    if gap.explained.is_loss:
        return f"Its running statistics suit these images: {anew}, they would lose accuracy, {change}."
    is_far = any(nan_as_farthest(layer.self_consistency) > STALE for layer in gap.layers)
    if is_far or gap.beyond.is_gain:
        return gap.verdict
    return (
        f"Its running statistics are right: {anew}, they give {gap.exact.accuracy:.1%}, and a change of"
        f" {change} is within chance."
    )


def _culprit(gap: Gap) -> str:
    """Which layer, what repairing it alone brings, and in what way it is wrong."""
    worst = next((layer for layer in gap.layers if layer.name == gap.worst_layer), None)
    if worst is None or worst.recovered is None:
        return "Many layers are wrong: to repair one alone gains nothing."
    alone = f"repaired alone, it gains {100 * worst.recovered:.1f} points"
    if worst.recovered >= MOST * gap.explained.accuracy:
        return f"Layer {worst.name} is to blame: {alone}. {_fault(worst)}"
    return f"Several layers are to blame, {worst.name} most of all: {alone}. {_fault(worst)}"


def _fault(layer: LayerGap) -> str:
    """What its two statistics are like beside what enters it."""
    shift, ratio = layer.mean_shift_in_input_deviations, layer.var_ratio
    spread = math.sqrt(max(0.0, layer.self_consistency**2 - shift**2))  # of ln(ratio), RMS over channels
    if not (math.isfinite(shift) and math.isfinite(spread) and ratio > 0):
        return "Its running statistics hold NaN, infinity or a negative variance."
    mean = f"is off by {_short(shift)} standard deviations of it" if shift >= INCONSISTENT else "is right"
    if spread < INCONSISTENT:
        return f"Compared with what enters it, its running_mean {mean}, and its running_var is right."
    is_alike = abs(math.log(ratio)) > 0.8 * spread  # in all channels, and in one direction
    var = (
        f"{_short(ratio)} times the variance"
        if is_alike
        else f"wrong by factors of about {_short(math.exp(min(spread, 700.0)))}"
    )
    return f"Compared with what enters it, its running_var is {var}; its running_mean {mean}."


def _short(value: float) -> str:
    """Two digits that count, and no exponent below ten million."""
    return f"{float(f'{value:.2g}'):,.7g}"


def _findings(content: Content, grave: Sequence[Finding]) -> str:
    if not grave:
        rules = plural(content.num_rules, "rule")
        sound = f"{rules} found no error and no warning in the stored numbers"
        if content.measurement is not None:
            return (
                f"{sound}: {'only images show it' if _is_stale(content) else 'there is nothing to repair'}."
            )
        return (
            f"{sound}; whether they fit the images, --measure tells."
            if content.how_to_measure
            else f"{sound}."
        )
    number = Counter(finding.severity for finding in grave)
    counts = " and ".join(
        plural(number[severity], severity) for severity in ("error", "warning") if number[severity]
    )
    worst = min(grave, key=lambda finding: finding.severity != "error")
    alike = [finding.layer or "the module itself" for finding in grave if finding.code == worst.code]
    where = list_names(alike, 3) if len(alike) < len(content.layers) or len(alike) == 1 else "every layer"
    advice = "" if _is_stale(content) else f" What to do: {worst.advice.rstrip('.')}."
    first = "first of all in" if len(grave) > 1 else "in"
    return f"{counts}, {first} {where}: {worst.message}.{advice}"
