"""The output of `bncli convert`."""

from collections import Counter
from dataclasses import asdict
from typing import Any

from bncli.checkpoints.convert import Conversion, ConvertedLayer
from bncli.cli.tables.layer_table import show_layer_table
from bncli.cli.tables.table import console_for_results, print_wrapped
from bncli.wording import list_names, plural


def conversion_document(source: str, output: str, conversion: Conversion, left: list[str]) -> dict[str, Any]:
    """The JSON document."""
    return {
        "source": source,
        "output": output,
        "framework": conversion.framework,
        "num_tensors": len(conversion.state_dict),
        "layers": [asdict(layer) for layer in conversion.layers],
        "notes": conversion.notes,
        "tensors_left_out": left,
    }


def show_conversion(source: str, output: str, conversion: Conversion, left: list[str]) -> None:
    """What was written, and what has to be set in the network, as no state dict says it."""
    console = console_for_results()
    layers = plural(len(conversion.layers), "BatchNorm layer")
    print_wrapped(console, f"{source}: {layers} of {conversion.framework}, written to {output}", style="bold")
    columns = {
        "channels": [str(layer.num_features) for layer in conversion.layers],
        "set eps": [_marked(f"{layer.eps:g}", layer.eps_assumed) for layer in conversion.layers],
        "set momentum": [_marked(_momentum(layer), layer.momentum_assumed) for layer in conversion.layers],
        "num_batches\n_tracked": [
            _marked(f"{layer.num_batches_tracked:,}", layer.counter_assumed) for layer in conversion.layers
        ],
    }
    console.print()
    show_layer_table(console, [layer.name for layer in conversion.layers], columns, None)
    if any(
        layer.eps_assumed or layer.momentum_assumed or layer.counter_assumed for layer in conversion.layers
    ):
        console.print()
        text = (
            "* not in the file: the default of its framework (--assume changes it), and a counter that fits."
        )
        print_wrapped(console, text)
    console.print()
    (eps, momentum), number = Counter((one.eps, _momentum(one)) for one in conversion.layers).most_common(1)[
        0
    ]
    which = "every layer" if number == len(conversion.layers) else "most layers"
    how = "None" if momentum == "cumulative" else momentum
    print_wrapped(
        console,
        f"A state dict holds no eps and no momentum: build {which} as"
        f" torch.nn.BatchNorm2d(C, eps={eps:g}, momentum={how}).",
    )
    factors = {layer.variance_factor for layer in conversion.layers}
    if factors != {1.0}:
        print_wrapped(console, f"Every variance was multiplied by {factors.pop():.9g}, Bessel's correction.")
    for note in conversion.notes:
        print_wrapped(console, note)
    if filled := [f"{leaf} of {layer.name}" for layer in conversion.layers for leaf in layer.filled]:
        print_wrapped(console, f"Written as 1 or 0, as the layer has none: {list_names(filled)}.")
    if left:
        tensors = plural(len(left), "other tensor")
        print_wrapped(
            console, f"Left out, as only BatchNorm layers are converted: {tensors} ({list_names(left)})."
        )


def _marked(text: str, assumed: bool) -> str:
    return f"{text}*" if assumed else f"{text} "


def _momentum(layer: ConvertedLayer) -> str:
    return "cumulative" if layer.momentum is None else f"{layer.momentum:g}"
