import re
from pathlib import Path

import pytest
from PIL import Image

from bncli.cli.plots.sweep import plot_sweep
from bncli.errors import BncliError
from bncli.evaluation import SweepPoint


def point(size: int, eval_accuracy: float, batch_accuracy: float | None) -> SweepPoint:
    def around(value: float) -> tuple[float, float]:
        return value - 0.02, value + 0.02

    interval = None if batch_accuracy is None else around(batch_accuracy)
    return SweepPoint(size, eval_accuracy, around(eval_accuracy), batch_accuracy, interval)


POINTS = (point(1, 0.9, None), point(2, 0.9, 0.4), point(16, 0.9, 0.7), point(256, 0.9, 0.9))


def draw(points: tuple[SweepPoint, ...], path: Path) -> str:
    plot_sweep(points, path, source="shapes, 99 images", num_classes=10)
    return path.read_text() if path.suffix == ".svg" else ""


def texts(svg: str) -> list[str]:
    """Matplotlib draws letters as shapes, and leaves the text in a comment."""
    return re.findall("<!-- (.*?) -->", svg)


def test_an_svg_says_what_it_shows(tmp_path: Path) -> None:
    found = texts(draw(POINTS, tmp_path / "x.svg"))
    for expected in (
        "1",
        "2",
        "16",
        "256",
        "100%",
        "40.0%",
        "70.0%",
        "guessing:",
        "1 of 10",
        "shapes, 99 images",
    ):
        assert expected in found
    assert "eval mode, running statistics: 90.0% in batches of any size" in found
    assert any(text.startswith("batch of 1: refused") for text in found)
    assert "90.0%" not in found  # beside the other line there is no room for a number


def test_eval_accuracies_that_differ_are_not_called_one(tmp_path: Path) -> None:
    points = (point(1, 0.88, 0.3), point(2, 0.9, 0.4))
    assert "eval mode, running statistics: 88.0% to 90.0% in batches of any size" in texts(
        draw(points, tmp_path / "x.svg")
    )


@pytest.mark.parametrize(
    "points",
    [
        (point(4, 0.5, 0.5),),
        (point(1, 1.0, None),),
        (point(1, 0.1, None), point(2, 0.1, None)),
        (point(3, 0.0, 0.2), point(5, 0.0, 0.0), point(7, 1.0, 1.0)),
    ],
)
def test_odd_sweeps_are_drawn_too(points: tuple[SweepPoint, ...], tmp_path: Path) -> None:
    draw(points, tmp_path / "x.svg")


def test_a_png_is_an_image_of_readable_size_and_the_same_each_time(tmp_path: Path) -> None:
    draw(POINTS, tmp_path / "x.png")
    draw(POINTS, tmp_path / "y.png")
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (1200, 690)


def test_other_formats_and_unwritable_paths_are_errors(tmp_path: Path) -> None:
    for path, expected in (
        (tmp_path / "x.gif", "use .png or .svg"),
        (tmp_path / "no" / "x.png", "cannot write"),
    ):
        with pytest.raises(BncliError, match=expected):
            draw(POINTS, path)
