"""What a framework itself says of the BatchNorm layers in a file, for the tests that run without it.

Used by the scripts `make_NAME.py` beside this one, each of which runs in an environment of its own; so this
needs NumPy only. `expected.json` beside the files holds, for each file, its layers in the network's order.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

FILES = Path(__file__).parent / "files"


def probe(num_features: int) -> Any:
    """An input (8, C) in float32, the same for every framework."""
    return np.linspace(-3, 5, 8 * num_features, dtype="f4").reshape(8, num_features)


def layer(
    name: str,
    *,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float | None,
    momentum: float | None,
    output: Any,
    eps_in_file: bool = True,
    momentum_in_file: bool = True,
) -> dict[str, Any]:
    """One layer: its numbers, `momentum` as PyTorch means it, its eval-mode output (8, C) for `probe(C)`."""
    return {
        "name": name,
        "running_mean": _numbers(mean),
        "running_var": _numbers(var),
        "weight": None if weight is None else _numbers(weight),
        "bias": None if bias is None else _numbers(bias),
        "eps": eps,
        "momentum": momentum,
        "eps_in_file": eps_in_file,
        "momentum_in_file": momentum_in_file,
        "output": np.asarray(output, dtype="f8").reshape(8, -1).tolist(),
    }


def _numbers(values: Any) -> list[float]:
    return [float(value) for value in np.asarray(values, dtype="f8").reshape(-1)]


def write(framework: str, files: dict[str, dict[str, Any]]) -> None:
    """Note what the files hold: `{"FILE": {"framework": ..., "layers": [...], "notes": [...]}}`."""
    text = json.dumps(files, indent=None, separators=(",", ":"))
    (FILES / framework / "expected.json").write_text(text.replace('{"name"', '\n{"name"') + "\n")
