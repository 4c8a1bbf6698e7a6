"""Ten further training steps from a saved file: the framework's own are recorded, PyTorch's are compared.

Each script `make_NAME.py` saves a network that it has trained for three steps, trains its layers for ten more
on `batch(0, shape)` to `batch(9, shape)`, and notes what that leaves. Needs NumPy only.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "files" / "ten_steps"
BEFORE = range(100, 103)  # steps before the file is saved
AFTER = range(10)
IMAGES, FEATURES = (8, 3, 2, 2), (8, 5)  # of a batch, as (N, C, ...)
N_OF = {"images": 32, "features": 8}  # values of a channel in them


def batch(step: int, shape: tuple[int, ...]) -> Any:
    """A float32 batch (N, C, ...): channels and steps have means and spreads of their own."""
    size = int(np.prod(shape))
    numbers = (np.arange(size) * 7919 + step * 104729) % 1009 / 1009  # even in [0, 1), by a formula
    channel = np.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
    spread = 1 + channel + step % 7 / 4
    return (spread * (numbers.reshape(shape) - 0.25) + channel - 1).astype("f4")


def channels_last(array: Any) -> Any:
    """(N, C, ...) as (N, ..., C)."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


def layer(name: str, shape: tuple[int, ...], *, mean: Any, var: Any, momentum: float, eps: float) -> Any:
    """What a layer holds after the ten steps; `momentum` as PyTorch means it."""
    return {
        "name": name,
        "shape": shape,
        "momentum": round(momentum, 12),
        "eps": eps,
        "running_mean": [float(value) for value in np.asarray(mean, "f8").reshape(-1)],
        "running_var": [float(value) for value in np.asarray(var, "f8").reshape(-1)],
    }


def write(name: str, file: str, layers: list[Any]) -> None:
    """Note what a framework made of the layers in a file of FOLDER."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(one) for one in layers)
    (FOLDER / f"{name}.json").write_text(f'{{"file": "{file}", "layers": [\n{lines}\n]}}\n')
