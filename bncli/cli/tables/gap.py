"""The output of `bncli eval --gap`."""

from rich.console import Console

from bncli.cli.messages import one_line
from bncli.cli.tables.table import number, show_lines, table_of
from bncli.evaluation import Gap, LayerGap
from bncli.evaluation.gap import SOURCES


def show_gap(console: Console, gap: Gap) -> None:
    """The four accuracies, and each layer's part."""
    console.print()
    table = table_of(f"The same {gap.num_images:,} test images", "BatchNorm uses", "accuracy", "loss")
    for name, score in gap.scores().items():
        table.add_row(SOURCES[name], f"{score.accuracy:.2%}", f"{score.loss:.4f} nats")
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


def _points(layer: LayerGap) -> str:
    return "" if layer.recovered is None else f"{100 * layer.recovered:+.1f} points"
