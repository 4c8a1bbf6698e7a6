"""The output of `bncli convert`."""

from collections import Counter
from dataclasses import asdict
from typing import Any, Literal

from rich.console import Console

from bncli.checkpoints.convert import Conversion, ConvertedLayer
from bncli.checkpoints.convert_to_keras import loading_lines
from bncli.cli.tables.layer_table import show_layer_table
from bncli.cli.tables.table import console_for_results, print_wrapped
from bncli.wording import list_names, plural

Target = Literal["pytorch", "keras"]


def conversion_document(
    source: str, output: str, conversion: Conversion, left: list[str], to: Target
) -> dict[str, Any]:
    """The JSON document."""
    return {
        "source": source,
        "output": output,
        "framework": conversion.framework,
        "to": to,
        "num_tensors": len(conversion.state_dict),
        "layers": [asdict(layer) for layer in conversion.layers],
        "notes": conversion.notes,
        "tensors_left_out": left,
        "tensors_missing": conversion.missing,
    }


def show_conversion(source: str, output: str, conversion: Conversion, left: list[str], to: Target) -> None:
    """What was written, and what has to be set in the network, as the new file does not say it."""
    console = console_for_results()
    layers = plural(len(conversion.layers), "BatchNorm layer")
    others = f" and {plural(len(conversion.used), 'other tensor')}" if conversion.used else ""
    print_wrapped(
        console, f"{source}: {layers}{others} of {conversion.framework}, written to {output}", style="bold"
    )
    eps_name = "epsilon" if to == "keras" else "eps"
    columns = {
        "channels": [str(layer.num_features) for layer in conversion.layers],
        f"set {eps_name}": [_marked(f"{layer.eps:g}", layer.eps_assumed) for layer in conversion.layers],
        "set momentum": [_marked(_momentum(layer), layer.momentum_assumed) for layer in conversion.layers],
    }
    if to == "pytorch":
        columns["num_batches\n_tracked"] = [
            _marked(f"{layer.num_batches_tracked:,}", layer.counter_assumed) for layer in conversion.layers
        ]
    console.print()
    show_layer_table(console, [layer.name for layer in conversion.layers], columns, None)
    assumed = any(layer.eps_assumed or layer.momentum_assumed for layer in conversion.layers)
    counted = to == "pytorch" and any(layer.counter_assumed for layer in conversion.layers)
    if assumed or counted:
        console.print()
        made_up = ", and a counter that fits" if to == "pytorch" else ""
        text = f"* not in the file: the default of its framework (--assume changes it){made_up}."
        print_wrapped(console, text)
    console.print()
    _show_what_to_set(console, output, conversion, to)
    factors = {layer.variance_factor for layer in conversion.layers}
    if factors != {1.0}:
        print_wrapped(console, f"Every variance was multiplied by {factors.pop():.9g}, Bessel's correction.")
    for note in conversion.notes:
        print_wrapped(console, note)
    if filled := [f"{leaf} of {layer.name}" for layer in conversion.layers for leaf in layer.filled]:
        print_wrapped(console, f"Written as 1 or 0, as the layer has none: {list_names(filled)}.")
    if conversion.framework == "PyTorch" and conversion.missing:
        return  # a note says why: nothing else was to be converted
    if left:
        what = "" if conversion.used else ", as only BatchNorm layers are converted"
        tensors = plural(len(left), "other tensor")
        print_wrapped(console, f"Left out{what}: {tensors} ({list_names(left)}).")
    if conversion.missing:
        tensors = plural(len(conversion.missing), "tensor")
        print_wrapped(
            console, f"Not in {output}: {tensors} of the network ({list_names(conversion.missing)})."
        )


def _show_what_to_set(console: Console, output: str, conversion: Conversion, to: Target) -> None:
    """How to build the layers, and for Keras how to load them."""
    settings = Counter((one.eps, _momentum(one)) for one in conversion.layers)
    (eps, momentum), number = settings.most_common(1)[0]
    which = "every layer" if number == len(conversion.layers) else "most layers"
    if to == "keras":
        how = f"BatchNormalization(epsilon={eps:g}, momentum={momentum})"
        text = f"The file holds no epsilon and no momentum: build {which} as keras.layers.{how}."
        print_wrapped(console, text)
        console.print("Load it with:\n")
        for line in loading_lines(output, conversion):
            console.print(f"    {line}", soft_wrap=True, markup=False, highlight=False)
        console.print()
        return
    how = f"eps={eps:g}, momentum={'None' if momentum == 'cumulative' else momentum}"
    classes = " or ".join(conversion.classes) or "BatchNorm1d, 2d or 3d"
    text = f"A state dict holds no eps and no momentum: build {which} as torch.nn.{classes}(C, {how})."
    print_wrapped(console, text)


def _marked(text: str, assumed: bool) -> str:
    return f"{text}*" if assumed else f"{text} "


def _momentum(layer: ConvertedLayer) -> str:
    return "cumulative" if layer.momentum is None else f"{layer.momentum:g}"
