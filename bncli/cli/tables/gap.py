"""The output of `bncli eval --gap`."""

from dataclasses import asdict
from typing import Any

from rich.console import Console

from bncli.cli.messages import one_line
from bncli.cli.tables.table import number, show_lines, table_of
from bncli.evaluation import Gap, LayerGap

SOURCES = {
    "running": "running statistics, as in eval mode",
    "batch": "batch statistics, dropout off",
    "precise": "population statistics, precise",
    "exact": "population statistics, exact",
}


def describe_gap(gap: Gap) -> dict[str, Any]:
    """The JSON document's `gap`."""
    return {
        **asdict(gap),
        "batch_norm_is_to_blame": gap.batch_norm_is_to_blame,
        "points": gap.points,
        "verdict": gap_verdict(gap),
    }


def show_gap(console: Console, gap: Gap) -> None:
    """The four accuracies, and each layer's part."""
    console.print()
    table = table_of(f"The same {gap.num_images:,} test images", "BatchNorm uses", "accuracy", "loss")
    for name, meaning in SOURCES.items():
        score = getattr(gap, name)
        table.add_row(meaning, f"{score.accuracy:.2%}", f"{score.loss:.4f} nats")
    console.print(table)
    console.print()
    title = f"Running statistics against {gap.num_calibration_images:,} training images"
    table = table_of(title, "layer", "self-consistency", "mean shift", "var ratio", "repair recovers")
    for layer in gap.layers:
        table.add_row(
            one_line(layer.name), number(layer.self_consistency),
            number(layer.mean_shift_in_input_deviations), number(layer.var_ratio), _points(layer),
        )  # fmt: skip
    console.print(table)
    console.print()
    meanings = {
        "self-consistency": "distance of both from the input in eval mode; 0 is best",
        "mean shift": "of running_mean, in deviations of the input",
        "var ratio": "running_var over the input's variance",
        "repair recovers": f"if only this layer is repaired, on {gap.num_trial_images:,} test images"
        if gap.num_trial_images
        else "not tried: there is nothing to recover",
    }
    show_lines(console, meanings)


def gap_verdict(gap: Gap) -> str:
    """One sentence: what BatchNorm explains, and what to do."""
    explained = f"{100 * gap.explained.accuracy:.1f}"
    change = (
        f"{100 * gap.explained.accuracy:+.2f} points of accuracy"
        f" (standard error {100 * gap.explained.accuracy_standard_error:.2f})"
    )
    if gap.batch_norm_is_to_blame:
        return (
            f"BatchNorm explains {explained} of {100 * gap.points:.1f} points; {_culprit(gap)};"
            " run bncli recalibrate."
        )
    if gap.beyond.is_gain:
        return (
            f"The running statistics are not stale: exact population statistics give {change}. But the test"
            f" images' own batch statistics gain {100 * gap.beyond.accuracy:.1f} points: test images look"
            " different from training images; check how both are preprocessed."
        )
    if gap.explained.is_loss:
        return (
            f"No gain: exact population statistics would lose accuracy, {change}; the running statistics"
            " suit the test images better, and BatchNorm is not to blame."
        )
    return (
        f"No gain beyond chance: exact population statistics give {change}; nothing here says that"
        " BatchNorm is to blame."
    )


def _culprit(gap: Gap) -> str:
    worst = next((layer for layer in gap.layers if layer.name == gap.worst_layer), None)
    if worst is None or worst.recovered is None:
        return "no repair of a single layer recovers any of it"
    recovered = f"{100 * worst.recovered:.1f}"
    if gap.num_trial_images < gap.num_images:
        recovered += f" on {gap.num_trial_images:,} of the images"
    if worst.recovered >= 0.9 * gap.explained.accuracy:
        return f"layer {one_line(worst.name)} is stale: its repair alone recovers {recovered}"
    return (
        f"several layers are stale, {one_line(worst.name)} most of all: its repair alone recovers {recovered}"
    )


def _points(layer: LayerGap) -> str:
    return "" if layer.recovered is None else f"{100 * layer.recovered:+.1f} points"
