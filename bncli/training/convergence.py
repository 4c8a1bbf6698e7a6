"""How each layer's running statistics came to match the batches, epoch by epoch: from a run's metrics.jsonl.

The distances were recorded while training (`bncli.batchnorm.tracking`); here they are only read. The last
line may be torn, by a crash or because the run is writing it now.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bncli.errors import RunError

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class EpochPoint:
    """One layer after one epoch; None for what could not be recovered (see `bncli.batchnorm.LayerEpoch`)."""

    epoch: int  # from 1
    mean_shift: float | None  # running mean from the batches', RMS over channels, in standard deviations
    var_ratio: float | None  # running over batch variance, geometric mean over channels
    running_mean_norm: float | None  # L2 norm over channels
    running_var_norm: float | None


@dataclass(frozen=True)
class LayerHistory:
    """One layer in those epochs that recorded it, in their order."""

    name: str
    epochs: tuple[EpochPoint, ...]  # at least one


def read_convergence(run_dir: Path) -> tuple[LayerHistory, ...]:
    """The layers in the order in which they first appear.

    Raises:
        RunError: when there are no metrics, no finished epoch, no layers, or a line that is none of ours.
    """
    path = run_dir / METRICS
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise RunError(f"{run_dir}: no {METRICS}: no epoch of this run has ended yet") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None
    points: dict[str, dict[int, EpochPoint]] = {}
    for number, line in enumerate(lines, 1):
        is_last = number == len(lines)  # without a line break behind it: torn, or nothing
        if not line.strip():
            continue
        try:
            for name, point in _read_epoch(line):
                points.setdefault(name, {})[point.epoch] = point  # an epoch that was run again counts once
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if not is_last:
                reason = f"{type(error).__name__}: {error}"
                raise RunError(f"{path}, line {number}: no line of bncli's metrics ({reason})") from None
    if not points:
        raise RunError(f"{path}: no finished epoch with a BatchNorm layer in it")
    return tuple(
        LayerHistory(name, tuple(epochs[epoch] for epoch in sorted(epochs)))
        for name, epochs in points.items()
    )


def _read_epoch(line: bytes) -> list[tuple[str, EpochPoint]]:
    """Raises ValueError, KeyError, TypeError or AttributeError for anything but a line of ours."""
    content = json.loads(line)
    epoch = int(content["epoch"])
    return [
        (
            str(layer["name"]),
            EpochPoint(
                epoch=epoch,
                mean_shift=_finite(layer.get("mean_shift")),
                var_ratio=_finite(layer.get("var_ratio")),
                running_mean_norm=_finite(layer.get("running_mean_norm")),
                running_var_norm=_finite(layer.get("running_var_norm")),
            ),
        )
        for layer in content["layers"]
    ]


def _finite(value: Any) -> float | None:
    """None stands for NaN and infinity in the metrics, as in all of our JSON."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None
