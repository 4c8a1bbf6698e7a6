"""Layers to report on, and a page without its drawing library, which takes seconds to make."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bncli.batchnorm import LayerStats, audit_layers, read_running_stats
from bncli.report import Content


class NoLibrary:
    """In the place of a `DrawingLibrary`."""

    def script(self) -> str:
        return "/* what draws */"


@pytest.fixture
def library() -> Any:
    return NoLibrary()


def layers_of(sizes: dict[str, int], **changes: object) -> tuple[LayerStats, ...]:
    """Sound layers with so many channels; `changes` are tensors by leaf, of the first layer."""
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{name}.{leaf}": torch.rand(size, generator=generator) + 0.5
        for name, size in sizes.items()
        for leaf in ("running_mean", "running_var", "weight", "bias")
    }
    for leaf, value in changes.items():
        state[f"{next(iter(sizes))}.{leaf}"] = torch.as_tensor(value)
    return read_running_stats(state)


@pytest.fixture
def content() -> Callable[..., Content]:
    def make(layers: Sequence[LayerStats], **more: Any) -> Content:
        values: dict[str, Any] = {
            "title": "model.pt",
            "sources": ("model.pt",),
            "layers": layers,
            "findings": audit_layers(layers),
            "num_rules": 15,
        }
        return Content(**{**values, **more})

    return make
