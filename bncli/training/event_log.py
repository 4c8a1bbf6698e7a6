"""The numbers of every epoch in the form that other programs show: TensorBoard's event files.

They are those of metrics.jsonl under the same names, at the epoch's last step; what belongs to a layer has
the layer's name behind a slash. They lie in the folder `tensorboard` of the run.

An epoch's checkpoint is saved before its numbers are written here, so a crash between the two would leave
them out. A run that goes on therefore writes its last finished epoch once more, and hides what was written
from that step on.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bncli.errors import ConfigError
from bncli.training.convergence import METRICS
from bncli.training.run_dir import writing

Report = Callable[[Any], None]  # that of `train`, which imports this module

TENSORBOARD = "tensorboard"


def check_log(names: Sequence[str]) -> None:
    """Raise ConfigError where a package is missing that `train.log` needs."""
    if TENSORBOARD in names and find_spec("tensorboard") is None:
        raise ConfigError(
            "train.log", ['tensorboard is not installed: pip install "bncli[tensorboard]", or leave it out']
        )


@contextmanager
def logged(report: Report, names: Sequence[str], run_dir: Path) -> Iterator[Report]:
    """A `report` that also writes what `train.log` names; `run_dir` is as the run begins or goes on.

    Raises RunError when the files cannot be written.
    """
    if TENSORBOARD not in names:
        yield report
        return
    from torch.utils.tensorboard import SummaryWriter

    with writing(run_dir):
        last = _last_epoch(run_dir / METRICS)
        writer = SummaryWriter(run_dir / TENSORBOARD, purge_step=last["step"] if last else 0)

    def write(metrics: Mapping[str, Any]) -> None:
        with writing(run_dir):
            for name, value in scalars_of(metrics):
                writer.add_scalar(name, value, metrics["step"])
            writer.flush()

    def tell(event: Any) -> None:
        metrics = getattr(event, "metrics", None)  # an epoch alone has them
        if metrics is not None:
            write(metrics)
        report(event)

    if last:
        write(last)
    try:
        yield tell
    finally:
        with writing(run_dir):
            writer.close()


def _last_epoch(path: Path) -> dict[str, Any] | None:
    """The last line of metrics.jsonl, which a run that goes on has cut behind its last finished epoch."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else None


def scalars_of(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The names and numbers of one line of metrics.jsonl, those of layers as NAME/LAYER."""
    for name, value in metrics.items():
        if name == "layers":
            for layer in value:
                for key, number in layer.items():
                    if _is_number(number):
                        yield f"{key}/{layer['name']}", number
        elif _is_number(value):
            yield name, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
