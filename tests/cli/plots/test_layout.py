"""Whatever is drawn, no text overlaps another, and none is cut."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bncli.batchnorm import LayerStats, compare, read_running_stats
from bncli.batchnorm.audit.audit_layers import audit_layers
from bncli.checkpoints import open_checkpoint
from bncli.cli.plots.compare import plot_comparison
from bncli.cli.plots.gap import plot_gap
from bncli.cli.plots.history import plot_convergence
from bncli.cli.plots.inspect_stats import plot_running_stats
from bncli.cli.plots.sweep import plot_sweep
from bncli.evaluation import Gap, LayerGap, PairedDifference, Score, SweepPoint
from bncli.training.convergence import EpochPoint, LayerHistory

Faults = Callable[[Callable[[Path], object]], list[str]]


def layers(*layer_spreads: tuple[int, float], seed: int = 0) -> dict[str, torch.Tensor]:
    """Per layer its channels, and the size of its activations."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for row, (channels, size) in enumerate(layer_spreads):
        numbers = torch.randn(2, channels, generator=generator)
        state[f"features.{row}.conv.bn.running_mean"] = numbers[0] * size
        state[f"features.{row}.conv.bn.running_var"] = numbers[1].exp() * size**2
    return state


def damaged() -> dict[str, torch.Tensor]:
    state = layers((16, 1.0), (32, 1.0), (8, 1.0))
    state["features.0.conv.bn.running_mean"][3] = math.nan
    state["features.1.conv.bn.running_var"][:] = math.nan
    state["features.2.conv.bn.running_var"][:3] = torch.tensor([math.inf, 0.0, -1.0])
    return state


def all_at(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(x, value) for name, x in layers((4, 1.0), (4, 1.0), (4, 1.0)).items()}


def long_named() -> dict[str, torch.Tensor]:
    long = "backbone.encoder.stages.0.blocks.12.mixer.convolution_of_the_third_kind.norm"
    return {
        name.replace("features.1", f"{long}.\u6f22\u5b57"): x for name, x in layers((9, 1), (9, 1)).items()
    }


def with_outliers() -> dict[str, torch.Tensor]:
    state = layers(*[(600, 1.0)] * 5)
    state["features.2.conv.bn.running_mean"][:9] = torch.linspace(-1e4, 1e4, 9)
    state["features.3.conv.bn.running_var"][:9] = torch.logspace(-30, 20, 9)
    return state


def nearly_equal() -> dict[str, torch.Tensor]:
    return {name: 1 + 1e-7 * torch.arange(len(x)) for name, x in layers((8, 1.0), (4, 1.0)).items()}


CASES = {
    "many layers": layers(*[(24, 0.01), (96, 1.0), (144, 30.0)] * 9),
    "one layer": layers((8, 1.0)),
    "one channel": layers((1, 1.0)),
    "one layer explodes": layers((16, 1.0), (32, 1e12), (64, 1.0)),
    "all explode": layers((16, 1e15), (32, 1e16)),
    "tiny": layers((16, 1e-15), (32, 1e-17)),
    "outliers": with_outliers(),
    "damaged": damaged(),
    "no number at all": all_at(math.nan),
    "zeros": all_at(0.0),
    "ones": all_at(1.0),
    "equal but for rounding": nearly_equal(),
    "long names": long_named(),
    "largest numbers": all_at(3e38),
    "smallest numbers": all_at(1e-45),
}  # fmt: skip


def draw_layers(state: dict[str, torch.Tensor]) -> Callable[[Path], object]:
    found: tuple[LayerStats, ...] = read_running_stats(state)
    return lambda path: plot_running_stats(found, audit_layers(found), path)


@pytest.mark.parametrize("case", CASES)
def test_running_statistics(case: str, layout_faults: Faults) -> None:
    assert layout_faults(draw_layers(CASES[case])) == []


@pytest.mark.parametrize("case", CASES)
def test_a_comparison(case: str, tmp_path: Path, layout_faults: Faults) -> None:
    first = CASES[case]
    torch.save(first, tmp_path / "first.pt")
    torch.save({name: x.flip(0) * 1.5 for name, x in first.items()}, tmp_path / "second.pt")
    with open_checkpoint(tmp_path / "first.pt") as one, open_checkpoint(tmp_path / "second.pt") as other:
        comparison = compare(one, other)
    source = "runs/of/last/week/" * 6
    assert layout_faults(lambda path: plot_comparison(comparison, path, first=source, second=source)) == []


@pytest.mark.parametrize(
    "scores", [[0.1, 0.2, 0.05], [0.01, 4e6], [math.nan, math.inf, 0.1], [0.0], [1e-9] * 40]
)
def test_a_gap(scores: list[float], layout_faults: Faults) -> None:
    difference = PairedDifference(100, 50, 1, 0.49, 0.01, -1.0, 0.1)
    parts = tuple(
        LayerGap(f"{'a_long_name.' * 5}{i}", score, score, 1.0, -0.1234) for i, score in enumerate(scores)
    )
    scored = [Score(accuracy, 1.0) for accuracy in (0.0, 0.5, 0.999, 1.0)]
    gap = Gap(100, 100, 100, *scored, difference, difference, parts, parts[0].name)
    assert layout_faults(lambda path: plot_gap(gap, path, source="shapes, 99 images " * 20)) == []


MANY_SIZES = (1, 2, 3, 4, 5, 6, 7, 60, 63, 64, 65, 1000, 1001)


@pytest.mark.parametrize("sizes", [(1,), (1, 2), (2, 3), tuple(2**i for i in range(11)), MANY_SIZES])
@pytest.mark.parametrize(
    ("eval_accuracy", "share"), [(0.02, 0.1), (0.12, 0.9), (0.5, 0.1), (0.9, 0.5), (1, 1)]
)
def test_a_sweep(sizes: tuple[int, ...], eval_accuracy: float, share: float, layout_faults: Faults) -> None:
    points = []
    for rank, size in enumerate(sizes):
        measured = None if size == 1 else eval_accuracy * share ** (1 / (rank + 1))
        interval = None if measured is None else (0.0, 1.0)
        points.append(SweepPoint(size, eval_accuracy, (0.0, 1.0), measured, interval))
    assert layout_faults(lambda path: plot_sweep(points, path, source="s", num_classes=10)) == []


LAGS: list[list[float | None]] = [
    [0.3, 0.2], [None, None], [0.0, 0.0], [1e12, 1e-12], [1.0, 1.0], [0.9, 1.1]
]  # fmt: skip


@pytest.mark.parametrize(
    ("num_layers", "values"),
    [
        *((1, values) for values in LAGS),
        (40, LAGS[0]),
        *(pytest.param(40, values, marks=pytest.mark.slow) for values in LAGS[1:]),
    ],
)
def test_a_history(num_layers: int, values: list[float | None], layout_faults: Faults) -> None:
    points = tuple(EpochPoint(epoch, x, x, 1.0, 1.0) for epoch, x in enumerate(values * 9, 1))
    histories = [LayerHistory(f"{'long.' * 9}{i}", points) for i in range(num_layers)]
    assert layout_faults(lambda path: plot_convergence(histories, path, source="runs/x " * 40)) == []
