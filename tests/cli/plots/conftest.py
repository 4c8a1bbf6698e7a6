from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest

Fault = str


@pytest.fixture
def layout_faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Fault]]:
    """Draw into a file, and say which texts overlap or are cut: matplotlib's own renderer measures them."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    drawn: dict[int, Text] = {}
    faults: list[Fault] = []
    draw_text = Text.draw

    def remember(text: Text, renderer: object, *rest: object) -> None:
        drawn[id(text)] = text
        draw_text(text, renderer, *rest)

    def measure(figure: Figure, *_: object, **__: object) -> None:
        renderer = figure.canvas.get_renderer()
        drawn.clear()
        figure.draw(renderer)  # instead of writing the file
        boxes = [
            (text.get_text(), text.get_window_extent(renderer))
            for text in drawn.values()
            if text.get_visible() and text.get_text().strip()
        ]
        assert len(boxes) > 5
        for (one, box), (other, other_box) in combinations(boxes, 2):
            # a pixel is what the edges of letters are blurred by
            if box.padded(-1).overlaps(other_box.padded(-1)):
                faults.append(f"{one!r} overlaps {other!r}")
        for text, box in boxes:
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            if not inside:
                faults.append(f"{text!r} is cut")

    monkeypatch.setattr(Text, "draw", remember)
    monkeypatch.setattr(Figure, "savefig", measure)

    def faults_of(draw: Callable[[Path], object]) -> list[Fault]:
        faults.clear()
        draw(tmp_path / "layout.png")
        return list(faults)

    return faults_of
