"""The first thing on the page: three sentences or so that say how it stands, and what to do."""

from collections import Counter
from collections.abc import Sequence

from bncli.batchnorm import Finding
from bncli.report.content import Content, Training
from bncli.wording import list_names, one_line, plural

Verdict = tuple[str, ...]


def judge(content: Content) -> Verdict:
    """What it is, whether its running statistics are right, and what to do; a paragraph each."""
    state = _state(content)
    return tuple(one_line(sentence) for sentence in (_subject(content), *state) if sentence)


def is_bad(content: Content) -> bool:
    """Whether something is wrong: an error, or running statistics that cost accuracy."""
    measured = content.measurement
    has_error = any(finding.severity == "error" for finding in content.findings)
    return has_error or (measured is not None and measured.gap.batch_norm_is_to_blame)


def _subject(content: Content) -> str:
    layers = plural(len(content.layers), "BatchNorm layer")
    channels = plural(sum(layer.num_features for layer in content.layers), "channel")
    has = f"{layers} with {channels}"
    if content.comparison is not None:
        return f"Two checkpoints of one network, {has}: {content.comparison.verdict}"
    found = content.measurement
    if found is not None:
        accuracy = found.gap.running.accuracy
        images = f"{found.gap.num_images:,} test images"
        return f"In eval mode the network is right on {accuracy:.1%} of {images}; it has {has}."
    if content.training is not None:
        return f"{_outcome(content.training)} It has {has}." if content.layers else _outcome(content.training)
    return f"{content.title} has {has}."


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
        sentences.append(measured.gap.verdict)
    elif content.convergence is not None:
        sentences.append(content.convergence.verdict)
    if not content.layers:
        return sentences
    sentences.append(_findings(content, grave))
    return sentences


def _findings(content: Content, grave: Sequence[Finding]) -> str:
    if not grave:
        rules = plural(content.num_rules, "rule")
        sound = f"{rules} found no error and no warning in the stored numbers"
        if content.measurement is not None:
            is_stale = content.measurement.gap.batch_norm_is_to_blame
            return f"{sound}: {'only the images show it' if is_stale else 'there is nothing to repair'}."
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
    advice = worst.advice.rstrip(".")
    return f"{counts}, first of all {worst.name} in {list_names(alike, 3)}: {worst.message}. {advice}."
