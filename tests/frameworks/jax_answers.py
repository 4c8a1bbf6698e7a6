"""What a framework itself says of the layers in the files that a script beside this makes.

`answers.json` lists, by file, the layers in the order in which the network calls them; `answers.npz` has their
arrays: running_mean, running_var, weight and bias as the framework evaluates with them, and an input (N, C) and
the layer's output for it in eval mode.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

ARRAYS = ("running_mean", "running_var", "weight", "bias", "input", "output")


class Answers:
    """Collects what is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layers: dict[str, list[dict[str, Any]]] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, file: str, name: str, *, eps: float, momentum: float, **arrays: Any) -> None:
        """One layer of a file; momentum as the framework writes it; arrays of it as in `ARRAYS`."""
        layers = self.layers.setdefault(file, [])
        entry: dict[str, Any] = {"name": name, "eps": eps, "momentum": momentum}
        if "count" in arrays:
            entry["count"] = int(arrays.pop("count"))
        layers.append(entry)
        for what, values in arrays.items():
            assert what in ARRAYS
            if values is not None:
                flat = np.asarray(values, dtype=np.float32)
                channels = np.asarray(arrays["running_mean"]).size
                shape = (-1, channels) if what in ("input", "output") else (channels,)
                self.arrays[f"{file}|{len(layers) - 1}|{what}"] = flat.reshape(shape)

    def write(self) -> None:
        """Both files."""
        (self.folder / "answers.json").write_text(json.dumps(self.layers, indent=1) + "\n")
        np.savez_compressed(self.folder / "answers.npz", **self.arrays)
