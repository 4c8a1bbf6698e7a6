import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from bncli.batchnorm.audit.audit_layers import audit_layers
from bncli.batchnorm.layers import LayerStats, read_running_stats
from bncli.cli.plots import inspect_stats as plot
from bncli.cli.plots import rows as plot_rows
from bncli.cli.plots.inspect_stats import plot_running_stats
from bncli.errors import BncliError


def layers(count: int = 3) -> tuple[LayerStats, ...]:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(*[nn.BatchNorm2d(16, eps=1e-3) for _ in range(count)])
    for norm in net:
        norm.running_mean.copy_(torch.randn(16, generator=generator))
        norm.running_var.copy_(torch.rand(16, generator=generator) + 0.1)
    return read_running_stats(net)


def draw(layers: Sequence[LayerStats], path: Path) -> None:
    plot_running_stats(layers, audit_layers(layers), path)


def texts(path: Path) -> list[str]:
    """What an SVG says: matplotlib draws letters as paths and notes each text in a comment."""
    return [text.strip() for text in re.findall(r"<!-- (.*?) -->", path.read_text(), re.DOTALL)]


@pytest.mark.slow
def test_a_png_has_pixels_in_proportion_to_the_layers(tmp_path: Path) -> None:
    heights = []
    for count in (1, 7, 53):
        path = tmp_path / f"{count}.png"
        draw(layers(count), path)
        with Image.open(path) as image:
            assert image.format == "PNG"
            heights.append(image.height)
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert heights[0] < heights[1] < heights[2]


def test_an_svg_names_layers_quantities_and_units(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    draw(layers(), path)
    found = texts(path)
    for text in ("0  (16)", "2  (16)", "running_mean", "running_var", "gain", "activation units"):
        assert text in found
    assert "Running statistics of 3 BatchNorm layers (48 channels)" in found
    assert any("|weight| / sqrt(running_var + eps)" in text for text in found)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PNG"])
def test_the_same_layers_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    draw(layers(), first)
    draw(layers(), second)
    assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in first.read_bytes()


def test_flagged_layers_are_marked_and_lost_values_counted(tmp_path: Path) -> None:
    given = layers(4)
    given[0].running_mean[:2] = math.nan
    given[1].running_var[:3] = 0.0
    given[1].weight[0] = 0.0
    given[2].running_var[0] = -1.0
    path = tmp_path / "a.svg"
    draw(given, path)
    found = " ".join(texts(path))
    assert "non_finite running_mean: 2 non-finite" in found.replace("\n", " ")
    for text in ("dead_channel", "running_var: 3 at 0; gain: 1 at 0", "running_var: 1 ≤ 0",
                 "gain: 1 non-finite", "negative_variance", "3 flagged"):  # fmt: skip
        assert text in found
    svg = path.read_text()
    for row, flagged in enumerate([True, True, True, False]):
        label = re.search(rf"<!-- {row}  \(16\) -->\s*<g[^>]*>", svg)
        assert label is not None
        assert (plot_rows.FLAGGED in label.group()) == flagged
    for colour in (plot_rows.FLAGGED, plot_rows.BAR):
        assert f"stroke: {colour}" in svg


def test_a_healthy_model_shows_no_warning_colour(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    draw(layers(), path)
    assert plot_rows.FLAGGED not in path.read_text()
    assert "flagged" not in " ".join(texts(path))


def test_values_at_the_edge_of_what_can_be_drawn_do_not_stop_the_plot(tmp_path: Path) -> None:
    given = list(read_running_stats(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))))
    given += read_running_stats(nn.BatchNorm2d(1, affine=False))
    given += read_running_stats({"a$\\b$.running_mean": torch.full((2,), math.nan),
                                 "a$\\b$.running_var": torch.full((2,), 1e-30)})  # fmt: skip
    path = tmp_path / "a.svg"
    draw(given, path)
    found = texts(path)
    assert "no_running_stats" in found
    assert "a$\\b$  (2)" in found  # a name is no formula
    assert "(model)  (1)" in found
    assert any("eps = 1e-5 assumed" in text for text in found)


def test_the_gain_is_the_factor_of_eval_mode() -> None:
    norm = nn.BatchNorm2d(3, eps=0.1).double().eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-2.0, 0.5, 1.0]))
    norm.running_var.copy_(torch.tensor([0.3, 4.0, 1e-3]))
    (layer,) = read_running_stats(norm)
    step = norm(torch.ones(1, 3, 1, 1).double()) - norm(torch.zeros(1, 3, 1, 1).double())
    assert torch.allclose(plot._gain(layer), step.flatten().abs())


def test_a_gain_without_weight_is_that_of_weight_1() -> None:
    (layer,) = read_running_stats(nn.BatchNorm2d(3, affine=False, eps=3.0))
    assert plot._gain(layer).tolist() == [0.5] * 3


@pytest.mark.parametrize("name", ["a.jpg", "a.pdf", "a"])
def test_another_suffix_is_refused_on_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(BncliError, match=r"use \.png or \.svg") as caught:
        draw(layers(), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not path.exists()


def test_a_path_that_cannot_be_written_is_refused_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a.png"
    with pytest.raises(BncliError, match="No such file or directory") as caught:
        draw(layers(), path)
    assert "\n" not in str(caught.value)


def test_no_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BncliError, match="no BatchNorm layers"):
        draw([], tmp_path / "a.png")


def test_the_users_matplotlib_settings_are_neither_used_nor_changed(tmp_path: Path) -> None:
    import matplotlib as mpl

    draw(layers(), tmp_path / "a.svg")
    with mpl.rc_context({"axes.facecolor": "#ff00ff", "font.size": 30}):
        draw(layers(), tmp_path / "b.svg")
        assert mpl.rcParams["font.size"] == 30
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_importing_the_module_loads_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, bncli.cli.plots.inspect_stats; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
