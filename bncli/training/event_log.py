"""The numbers of every epoch in the form that other programs show: TensorBoard's event files.

They are those of metrics.jsonl under the same names, at the epoch's last step; what belongs to a layer has
the layer's name behind a slash. They lie in the folder `tensorboard` of the run.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bncli.errors import ConfigError
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
def logged(report: Report, names: Sequence[str], run_dir: Path, first_step: int) -> Iterator[Report]:
    """A `report` that also writes what `train.log` names; what a run wrote after `first_step` is hidden.

    Raises RunError when the files cannot be written.
    """
    if TENSORBOARD not in names:
        yield report
        return
    from torch.utils.tensorboard import SummaryWriter

    with writing(run_dir):
        purge = first_step + 1 if first_step else None
        writer = SummaryWriter(run_dir / TENSORBOARD, purge_step=purge)

    def tell(event: Any) -> None:
        metrics = getattr(event, "metrics", None)  # an epoch alone has them
        if metrics is not None:
            with writing(run_dir):
                for name, value in scalars_of(metrics):
                    writer.add_scalar(name, value, metrics["step"])
                writer.flush()
        report(event)

    try:
        yield tell
    finally:
        with writing(run_dir):
            writer.close()


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
