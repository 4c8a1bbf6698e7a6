"""`bncli report`, and the page that `bncli train` keeps."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Bncli


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drawing library takes seconds, and tests/report has it whole."""
    monkeypatch.setattr("bncli.report.library.DrawingLibrary.script", lambda self: "/* draws */")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that a browser was asked to show."""
    found: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: found.append(address) or True)
    return found


def test_a_run_has_its_page_beside_it(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    outcome = bncli("report", finished_run, "-o", path, "--json")
    assert outcome.code == 0
    assert outcome.json["num_bytes"] == path.stat().st_size
    assert outcome.json["report"] == str(path)
    text = path.read_text()
    assert 'id="training"' in text
    assert 'id="history"' in text
    assert 'id="batch-size"' not in text
    assert bncli("report", finished_run, "-o", path).out.splitlines()[-1] == f"report         {path}"


def test_measuring_adds_what_needs_images(
    bncli: Bncli, finished_run: Path, tmp_path: Path, opened: list[str]
) -> None:
    path = tmp_path / "page.html"
    outcome = bncli(
        "report", finished_run, "--measure", "--num-images", 40, "-o", path, "--open", "--layer", "stages.1.*"
    )
    assert outcome.code == 0, outcome.err
    text = path.read_text()
    assert 'id="gap"' in text
    assert "The same 40 test images of synthetic" in text
    assert opened == [path.resolve().as_uri()]
    layers = re.search(r'"layers":\{"name":(\[.*?\])', text)[1]
    assert layers == '["stages.1.0.norm"]'


def test_two_files_are_compared(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert bncli("report", finished_run / "best.pt", finished_run / "last.pt", "-o", path).code == 0
    assert 'id="comparison"' in path.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("A", "A", "A"), "give one SOURCE, or two to be compared, not 3"),
        (("A", "A", "--measure"), "--measure: measures one network"),
        (("A", "--set", "runtime.threads=1"), "--set: what is read needs no network"),
        (("A", "-o", "A"), "is an input, which is never changed"),
        (("A", "-o", "nowhere/x.html"), "there is no directory"),
        (("nothing.pt",), "nothing.pt: cannot be read: No such file"),
        (("A", "--layer", "zzz"), "--layer: "),
    ],
)
def test_bad_words_are_refused_in_one_line(
    bncli: Bncli, finished_run: Path, tmp_path: Path, monkeypatch: Any, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = bncli("report", *(finished_run / "last.pt" if word == "A" else word for word in words))
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_made_leaves_the_old_one(
    bncli: Bncli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a.running_mean": torch.zeros(3), "a.running_var": torch.ones(3)}, tmp_path / "a.pt")
    path = tmp_path / "page.html"
    path.write_text("before")
    monkeypatch.setattr("bncli.report.page._data", lambda content: 1 / 0)
    assert bncli("report", tmp_path / "a.pt", "-o", path).code == 2
    assert path.read_text() == "before"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.pt", "page.html"]


def test_training_keeps_the_page_up_to_date(
    bncli: Bncli, tiny_config: Path, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bncli.cli import report_file

    pages: list[str] = []
    save = report_file.save_report

    def spy(content: Any, library: Any, path: Path) -> int:
        size = save(content, library, path)
        pages.append(path.read_text())
        return size

    monkeypatch.setattr(report_file, "save_report", spy)
    run = tmp_path / "run"
    outcome = bncli("train", tiny_config, "--run-dir", run, "--open")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == f"report         {run / 'report.html'}"
    assert ["After epoch 1 of 2" in pages[0], "After epoch 2 the" in pages[1]] == [True, True]
    assert all(page.endswith("</html>") for page in pages)
    assert opened == [(run / "report.html").resolve().as_uri()]  # once
    assert bncli("train", "--resume", run, "--report").code == 0  # what is there is no hindrance


def test_a_page_that_cannot_be_written_does_not_end_the_run(
    bncli: Bncli, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bncli.errors import BncliError

    def fail(*_: object) -> int:
        raise BncliError("the disk is full")

    monkeypatch.setattr("bncli.cli.report_file.save_report", fail)
    outcome = bncli("train", tiny_config, "--run-dir", tmp_path / "run", "--report")
    assert outcome.code == 0
    assert outcome.err.count("the report was not written: the disk is full") == 1


@pytest.mark.slow
def test_the_page_of_a_run_is_whole_whenever_it_is_read(tiny_config: Path, tmp_path: Path) -> None:
    path = tmp_path / "run" / "report.html"
    words = ["train", str(tiny_config), "--run-dir", str(path.parent), "--report", "--set", "train.epochs=25"]
    seen: set[str] = set()
    with subprocess.Popen([sys.executable, "-m", "bncli", *words], stdout=subprocess.DEVNULL) as training:
        while training.poll() is None:
            if path.exists():
                text = path.read_text()
                assert text.startswith("<!DOCTYPE html>")
                assert text.endswith("</html>")
                data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1]
                assert len(json.loads(data)["training"]["epoch"]) > 0
                seen.add(text)
    assert training.returncode == 0
    assert len(seen) > 3  # versions, so it was read while it was being replaced
    assert "After epoch 25 the network" in path.read_text()
