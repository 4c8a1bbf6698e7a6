"""How each layer's running statistics came to match the batches, epoch by epoch: from a run's metrics.jsonl.

The distances were recorded while training (`bncli.batchnorm.tracking`); here they are only read. The last
line may be torn, by a crash or because the run is writing it now.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bncli.errors import RunError
from bncli.wording import plural

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class EpochPoint:
    """One layer after one epoch; None for what could not be recovered (see `bncli.batchnorm.LayerEpoch`).

    In metrics.jsonl the first number is called `mean_shift`: a run that is resumed adds to the lines it has.
    """

    epoch: int  # from 1
    mean_shift_in_batch_deviations: float | None  # running_mean from the batches' mean, RMS over channels
    var_ratio: float | None  # running over batch variance, geometric mean over channels
    running_mean_norm: float | None  # L2 norm over channels
    running_var_norm: float | None


@dataclass(frozen=True)
class LayerHistory:
    """One layer in those epochs that recorded it, in their order."""

    name: str
    epochs: tuple[EpochPoint, ...]  # at least one

    def __str__(self) -> str:
        """One line."""
        last = self.epochs[-1]
        if last.mean_shift_in_batch_deviations is None or last.var_ratio is None:
            return f"{self.name}: what its batches were like after epoch {last.epoch} is unknown"
        return (
            f"{self.name}: after epoch {last.epoch} running_mean is off by"
            f" {last.mean_shift_in_batch_deviations:.2g} of the batches' deviations, running_var is"
            f" {last.var_ratio:.2g} times theirs"
        )


@dataclass(frozen=True)
class Convergence:
    """What a run recorded about its BatchNorm layers."""

    run_dir: str
    layers: tuple[LayerHistory, ...]  # in the order in which they first appear; at least one

    @property
    def epochs(self) -> list[int]:
        """All that recorded a layer, in order."""
        return sorted({point.epoch for layer in self.layers for point in layer.epochs})

    @property
    def verdict(self) -> str:
        """How well the running statistics match the batches of the last epoch, in a sentence or two."""
        last = {layer.name: layer.epochs[-1] for layer in self.layers}
        found = {
            name: (point.mean_shift_in_batch_deviations, point.var_ratio)
            for name, point in last.items()
            if point.mean_shift_in_batch_deviations is not None and point.var_ratio is not None
        }
        unknown = len(last) - len(found)
        if not found:
            return f"What the batches of epoch {self.epochs[-1]} were like is unknown for every layer."
        lost = f" Of {unknown} of {len(last)} layers the batches are unknown." if unknown else ""
        worst = max(found, key=lambda name: found[name][0])
        ratios = [ratio for _, ratio in found.values()]
        return (
            f"After epoch {self.epochs[-1]} running_mean is off by at most {found[worst][0]:.2g} of the"
            f" batches' deviations (in {worst}), and running_var is {min(ratios):.2g} to {max(ratios):.2g}"
            f" times the batches' variance.{lost}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "run_dir": self.run_dir,
            "verdict": self.verdict,
            "num_layers": len(self.layers),
            "layers": self.layers,
        }

    def __str__(self) -> str:
        """What was recorded, and the verdict."""
        epochs = f"epoch {self.epochs[0]}" + (f" to {self.epochs[-1]}" if len(self.epochs) > 1 else "")
        return f"{self.run_dir}: {plural(len(self.layers), 'BatchNorm layer')}, {epochs}. {self.verdict}"


def eval_lag(layers: Sequence[Mapping[str, Any]]) -> float | None:
    """How far the running statistics are from those of an epoch's batches, in the layer where it is furthest.

    `layers` is that key of the epoch's metrics. Per layer sqrt(shift**2 + ln(ratio)**2) of the two distances
    in `EpochPoint`: about 0 where eval mode normalises as the epoch's batches did; with 0.1 it is off by a
    tenth of their deviations. None where no layer's batches are known.
    """
    distances = [
        math.hypot(layer["mean_shift"], math.log(layer["var_ratio"]))
        for layer in layers
        if layer["mean_shift"] is not None and layer["var_ratio"]
    ]
    return max(distances, default=None)


def read_convergence(run_dir: Path) -> Convergence:
    """Read a run directory of `bncli train`.

    Raises:
        RunError: when there are no metrics, no finished epoch, no layers, or a line that is none of ours.
    """
    path = run_dir / METRICS
    if not run_dir.is_dir():
        what = "is a file: history reads the directory of a run" if run_dir.exists() else "no such directory"
        raise RunError(f"{run_dir}: {what}")
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise RunError(
            f"{run_dir}: no {METRICS}: either no run of bncli, or none of its epochs has ended yet"
        ) from None
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
    layers = (
        LayerHistory(name, tuple(epochs[epoch] for epoch in sorted(epochs)))
        for name, epochs in points.items()
    )
    return Convergence(str(run_dir), tuple(layers))


def _read_epoch(line: bytes) -> list[tuple[str, EpochPoint]]:
    """Raises ValueError, KeyError, TypeError or AttributeError for anything but a line of ours."""
    content = json.loads(line)
    epoch = int(content["epoch"])
    return [
        (
            str(layer["name"]),
            EpochPoint(
                epoch=epoch,
                mean_shift_in_batch_deviations=_finite(layer.get("mean_shift")),
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
