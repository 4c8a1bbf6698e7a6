"""The proof of an exported file: it is opened again, and computes what the network computes."""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bncli.batchnorm.modes import eval_mode, preserved_buffers
from bncli.errors import BncliError
from bncli.export.engine_network import EngineNetwork
from bncli.export.exported_file import exported_file
from bncli.export.open_engine import open_engine
from bncli.export.record import Precision

# of the largest output of an image: what differs by more is no rounding
TOLERANCES: dict[Precision, float] = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Proof:
    """The outputs of the file beside those of the network, for the same images."""

    engine: str  # that computed the file
    num_images: int
    images: str  # what they were
    max_abs_diff: float
    max_rel_diff: float  # of an output, relative to the largest of its image; inf: a NaN in one alone
    predictions_changed: int | None  # None: the outputs are no scores of classes
    tolerance: float
    tolerance_was_given: bool = False  # by the user: it may be more than rounding explains

    @property
    def holds(self) -> bool:
        """No output differs by more than the tolerance, so no prediction does that was no tie within it."""
        return self.max_rel_diff <= self.tolerance

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.holds:
            exactness = "but for rounding" if self.max_abs_diff else "to the bit"
            if self.max_abs_diff and self.tolerance_was_given:
                exactness = f"within the tolerance of {self.tolerance:g}"
            return f"The file computes what the checkpoint does, {exactness}."
        return (
            f"The file does NOT compute what the checkpoint does: an output differs by"
            f" {self.max_rel_diff:.2g} of the largest, {self.tolerance:g} is allowed."
        )


def prove(
    model: nn.Module,
    other: nn.Module,
    images: Tensor,
    *,
    engine: str,
    what: str,
    tolerance: float,
    tolerance_was_given: bool = False,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda _: None,
) -> Proof:
    """Compare `other` with `model`, which is left as it was, on images (N, ...).

    Raises BncliError where the shapes of their outputs differ.
    """
    most = relative = 0.0
    changed, classifies = 0, True
    with eval_mode(model), preserved_buffers(model), torch.no_grad():
        done = 0
        for batch in images.split(batch_size):
            right, found = model(batch).double(), other(batch).double()
            if right.shape != found.shape:
                raise BncliError(
                    f"the file returns {tuple(found.shape)} for {len(batch)} images, the network"
                    f" {tuple(right.shape)}"
                )
            difference = _difference(right, found)
            most = max(most, float(difference.max()))
            rows = right.flatten(1).abs().nan_to_num().amax(1).clamp_min(1e-30)
            relative = max(relative, float((difference.flatten(1).amax(1) / rows).max()))
            classifies &= right.dim() == 2
            if classifies:
                changed += int((right.argmax(1) != found.argmax(1)).sum())
            done += len(batch)
            progress(done)
    predictions_changed = changed if classifies else None
    return Proof(
        engine, len(images), what, most, relative, predictions_changed, tolerance, tolerance_was_given
    )


def _difference(right: Tensor, found: Tensor) -> Tensor:
    difference = (right - found).abs()
    same = (right == found) | (right.isnan() & found.isnan())  # two infinities differ by NaN
    return torch.where(same, 0.0, difference.nan_to_num(nan=float("inf"), posinf=float("inf")))


def opened_again(file: Path, network: nn.Module, threads: int | None = None) -> tuple[nn.Module, str]:
    """A file that was written of `network`, and what computes it.

    Raises BncliError where it cannot be opened.
    """
    if file.suffix.lower() == ".safetensors":
        load: Any = importlib.import_module("safetensors.torch").load_file
        twin = copy.deepcopy(network)
        twin.load_state_dict(load(file))
        return twin, f"safetensors, computed by PyTorch {torch.__version__}"
    exported = exported_file(file)
    if exported is None:
        raise BncliError(f"{file.name}: what was written cannot be recognised")
    engine = open_engine(exported, threads)
    return EngineNetwork.of(exported, engine), engine.description
