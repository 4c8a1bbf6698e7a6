"""The output of `bncli export`."""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from bncli.cli.tables.layer_table import show_layer_table
from bncli.cli.tables.table import console_for_results, number, print_wrapped, show_lines
from bncli.export.prepared import BY_DEFAULT
from bncli.wording import list_names, plural

if TYPE_CHECKING:
    from bncli.export.export_network import Exported
    from bncli.export.record import ExportRecord


def export_document(checkpoint: str, output: str, found: "Exported") -> dict[str, Any]:
    """The JSON document."""
    return {"checkpoint": checkpoint, "output": output, **found.to_dict()}


def show_export(checkpoint: str, output: str, found: "Exported", *, details: bool) -> None:
    """What was written, what became of BatchNorm, the proof, and the verdict."""
    console = console_for_results()
    record, proof = found.record, found.proof
    files = list_names([file.name for file in found.files])
    size = f"{found.num_bytes / 1e6:,.2f} MB" if found.num_bytes >= 1e6 else f"{found.num_bytes / 1e3:.1f} kB"
    print_wrapped(
        console, f"{checkpoint}: {f'written to {output}' if files else 'NOT written'}", style="bold"
    )
    changed = proof.predictions_changed
    lines = {
        "file": f"{size}, {record.precision}" + (f" ({files})" if len(found.files) > 1 else ""),
        **({} if output.endswith(".safetensors") else {"takes": _takes(record)}),
        "BatchNorm": record.sentence.replace(" BatchNorm", ""),
        "engine": proof.engine,
        "compared on": proof.images,
        "largest difference": f"{number(proof.max_abs_diff)}, that is {number(proof.max_rel_diff)} of the"
        f" image's largest output ({proof.tolerance:g} is allowed)",
        "predictions changed": "-" if changed is None else f"{changed:,} of {proof.num_images:,}",
    }
    show_lines(console, lines)
    reasons = defaultdict(list)
    for name, reason in record.kept:
        reasons[reason].append(name)
    for reason, names in reasons.items():
        because = " (--fold folds them)" if reason == BY_DEFAULT else f", {reason}"
        print_wrapped(console, f"Kept{because}: {list_names(names)}")
    _show_layers(console, found, details=details)
    for layer in found.beyond_precision:
        print_wrapped(
            console,
            f"{layer.name}: its gain, {layer.gain:.3g}, is {layer.gain_per_median:.3g} times its layer's"
            f" median and more than {record.precision} can carry: it multiplies rounding (bncli explain"
            " BN007).",
        )
    console.print()
    print_wrapped(console, proof.verdict, style="bold")
    if not found.files:
        print_wrapped(
            console, "Nothing was written; --tolerance X allows more, --force writes it all the same."
        )


def _takes(record: "ExportRecord") -> str:
    shape = ", ".join(map(str, record.image_shape))
    scale = (
        ""
        if record.normalization is None
        else (" from 0 to 255" if record.pixels == "uint8" else " from 0 to 1")
    )
    return f"{record.pixels} (N, {shape}){scale}"


def _show_layers(console: Any, found: "Exported", *, details: bool) -> None:
    """The error of each folded layer; without details the three worst."""
    layers = found.layers
    if not layers:
        return
    shown = layers
    if not details and len(layers) > 3:
        worst = sorted(layers, key=lambda layer: -layer.error)[:3]
        shown = tuple(layer for layer in layers if layer in worst)
    console.print()
    columns = {
        "gain": [number(layer.gain) for layer in shown],
        "error\nfolded": [number(layer.error) for layer in shown],
        "error\nas it was": [number(layer.error_unfolded) for layer in shown],
        "added": [number(layer.added) for layer in shown],
    }
    show_layer_table(console, [layer.name for layer in shown], columns)
    more = len(layers) - len(shown)
    end = f"; {plural(more, 'layer')} with smaller ones: --details" if more else ""
    print_wrapped(console, f"Largest error beside float64, in root mean squares of the layer's output{end}.")
