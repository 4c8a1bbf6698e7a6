"""What a framework itself says of the layers in the files that a script beside this makes.

`answers.json` lists, by file, the layers in the order of their calls. `answers.f32` has their
arrays, float32 one after another, each where `arrays` says (first number, shape): running_mean, running_var,
weight and bias as the framework evaluates with them, an input (N, C) and its output in eval mode.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

ARRAYS = ("running_mean", "running_var", "weight", "bias", "input", "output")
MAX_ROWS = 6  # of an input


class Answers:
    """Collects what is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layers: dict[str, list[dict[str, Any]]] = {}
        self.numbers: list[np.ndarray] = []

    def add(self, file: str, name: str, *, eps: float, momentum: float, **arrays: Any) -> None:
        """One layer of a file; momentum as the framework writes it; arrays of it as in `ARRAYS`."""
        entry: dict[str, Any] = {"name": name, "eps": eps, "momentum": momentum, "arrays": {}}
        if "count" in arrays:
            entry["count"] = int(arrays.pop("count"))
        self.layers.setdefault(file, []).append(entry)
        channels = np.asarray(arrays["running_mean"]).size
        for what, values in arrays.items():
            assert what in ARRAYS
            if values is not None:
                shape = (-1, channels) if what in ("input", "output") else (channels,)
                array = np.asarray(values, dtype=np.float32).reshape(shape)
                array = array[:MAX_ROWS] if what in ("input", "output") else array
                entry["arrays"][what] = [sum(part.size for part in self.numbers), *array.shape]
                self.numbers.append(array)

    def same(self, file: str, other: str) -> None:
        """A file that holds what another one does."""
        self.layers[file] = other  # type: ignore[assignment]

    def write(self) -> None:
        """Both files."""
        text = ",\n".join(
            f"{json.dumps(file)}: "
            + (
                json.dumps(layers)
                if isinstance(layers, str)
                else "[\n" + ",\n".join(json.dumps(layer) for layer in layers) + "\n]"
            )
            for file, layers in self.layers.items()
        )
        (self.folder / "answers.json").write_text(f"{{\n{text}\n}}\n")
        np.concatenate([part.ravel() for part in self.numbers]).astype("<f4").tofile(
            self.folder / "answers.f32"
        )


def read_answers(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By file the layers, with their arrays by name."""
    numbers = np.fromfile(folder / "answers.f32", dtype="<f4")
    said: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    own = {file: layers for file, layers in said.items() if not isinstance(layers, str)}
    for layers in own.values():
        for layer in layers:
            for what, (start, *shape) in layer["arrays"].items():
                layer["arrays"][what] = numbers[start : start + int(np.prod(shape))].reshape(shape)
    return {file: own[layers if isinstance(layers, str) else file] for file, layers in said.items()}
