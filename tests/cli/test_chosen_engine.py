"""`runtime.engine`: another engine computes what PyTorch does, and what it cannot do is refused."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bncli.cli import chosen_engine
from bncli.cli.chosen_engine import with_engine
from bncli.cli.opened_checkpoint import open_subject
from bncli.export.engines import OnnxRuntime
from bncli.export.fastest import times_in_turns
from bncli.models import build_network
from tests.conftest import Bncli
from tests.missing_packages import without

FEW = ("--num-images", 16, "--batch-sizes", "2,16")


def evaluated(bncli: Bncli, run: Path, *options: object) -> Any:
    return bncli("eval", run / "last.pt", *FEW, "--json", *options).json


def test_the_engine_computes_and_the_claims_are_checked_on_it(bncli: Bncli, finished_run: Path) -> None:
    pytest.importorskip("onnxruntime")
    ours = evaluated(bncli, finished_run)
    theirs = evaluated(bncli, finished_run, "--engine", "onnxruntime", "--batch-invariant")
    assert theirs["runtime"]["engine"].startswith("ONNX Runtime ")
    assert "engine" not in ours["runtime"]
    for key in ("accuracy", "per_class_accuracy", "num_images", "epoch", "dataset"):
        assert theirs[key] == ours[key]
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert theirs["loss"] != ours["loss"]  # other kernels
    assert theirs["determinism"]["train_mode"] is None
    assert theirs["determinism"]["claims"]["batch_size"]["bitwise_equal"]
    assert theirs["fixed_rows"] == 64


def test_predict_answers_as_with_pytorch(bncli: Bncli, finished_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    words = ("predict", finished_run / "last.pt", tmp_path / "a.png", "--top", 3, "--json")
    ours, theirs = bncli(*words).json, bncli(*words, "--set", "runtime.engine=onnxruntime").json
    assert theirs["runtime"]["engine"].startswith("ONNX Runtime ")
    (right,), (found,) = ours["predictions"], theirs["predictions"]
    assert [one["class"] for one in found["top"]] == [one["class"] for one in right["top"]]
    expected = [one["probability"] for one in right["top"]]
    assert [one["probability"] for one in found["top"]] == pytest.approx(expected, rel=1e-4)


def test_auto_takes_what_it_measured_to_be_faster(
    bncli: Bncli, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    without(monkeypatch, "openvino")
    for best in ("onnxruntime", "torch"):

        def measured(ways: dict[str, Callable[[], object]], best: str = best) -> dict[str, float]:
            return {name: 0.001 if name == best else 0.002 for name in ways}

        monkeypatch.setattr("bncli.export.fastest.times_in_turns", measured)
        outcome = bncli("eval", finished_run / "last.pt", *FEW, "--json", "--engine", "auto")
        assert ("engine" in outcome.json["runtime"]) == (best == "onnxruntime")
        title = {"onnxruntime": "ONNX Runtime", "torch": "PyTorch"}[best]
        (line,) = [line for line in outcome.err.splitlines() if "runtime.engine=auto" in line]
        start = f"runtime.engine=auto takes {title}; for 60 images: {title} in float32 1 ms, "
        assert line.removeprefix("bncli: ").startswith(start)
        assert line.endswith(" in float32 2 ms, OpenVINO: not installed")


def test_auto_takes_the_fastest_of_all_three(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On AVX2 without bfloat16, say, that is ONNX Runtime. OpenVINO need not be installed for this."""
    pytest.importorskip("onnxruntime")
    subject = open_subject(finished_run / "last.pt", ["runtime.engine=auto"], command="predict")
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    handed = chosen_engine._computed_by(subject, "onnxruntime", images)
    asked = []

    def computed(subject: Any, engine: str, images: torch.Tensor) -> Any:
        asked.append(engine)
        return replace(handed, path=Path(engine))

    monkeypatch.setattr(chosen_engine, "_computed_by", computed)
    monkeypatch.setattr("bncli.export.engines.require_engine", lambda name: None)
    for best in ("torch", "onnxruntime", "openvino"):
        times = {"torch": 0.003, "onnxruntime": 0.002, "openvino": 0.004, best: 0.001}
        monkeypatch.setattr("bncli.export.fastest.times_in_turns", lambda ways, times=times: times)
        found = with_engine(subject, lambda: images)
        assert asked == ["onnxruntime", "openvino"]
        assert found.path == (subject.path if best == "torch" else Path(best))
        asked.clear()


def test_auto_leaves_out_an_engine_that_computes_something_else(
    bncli: Bncli, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    without(monkeypatch, "openvino")
    compute = OnnxRuntime.__call__
    monkeypatch.setattr(OnnxRuntime, "__call__", lambda self, images: compute(self, images)[:, ::-1].copy())
    right = evaluated(bncli, finished_run)["accuracy"]
    outcome = bncli("eval", finished_run / "last.pt", *FEW, "--json", "--engine", "auto")
    assert outcome.json["accuracy"] == right
    said = r"auto takes PyTorch; .*, ONNX Runtime \S+ in float32 differs from PyTorch in float32 by \d"
    assert re.search(said, outcome.err)
    outcome = bncli("eval", finished_run / "last.pt", *FEW, "--json", "--engine", "onnxruntime")
    assert outcome.json["accuracy"] != right
    assert "differs from PyTorch in float32 by" in outcome.err


def test_without_engines_auto_stays_with_pytorch_and_others_name_their_extra(
    bncli: Bncli, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "onnxruntime", "openvino")
    outcome = bncli("eval", finished_run / "last.pt", *FEW, "--json", "--engine", "auto")
    assert outcome.code == 0
    assert "auto takes PyTorch" in outcome.err
    assert outcome.err.rstrip().endswith("ONNX Runtime: not installed, OpenVINO: not installed")
    assert outcome.json["accuracy"] == evaluated(bncli, finished_run)["accuracy"]
    for engine, extra in (("onnxruntime", "onnx"), ("openvino", "openvino")):
        outcome = bncli("eval", finished_run / "last.pt", "--engine", engine)
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.endswith(f"{engine} is not installed: pip install 'bncli[{extra}]'\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gap",), "--gap: runtime.engine=onnxruntime computes eval mode alone"),
        (("--sweep", "2"), "--sweep: runtime.engine=onnxruntime computes eval mode alone"),
        (("--set", "runtime.precision=bfloat16"), "ONNX Runtime computes in float32"),
        (("--set", "runtime.memory_format=contiguous"), "ONNX Runtime chooses it"),
        (("--set", "runtime.engine=openvino"), "--engine: it says 'onnxruntime', but"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_in_one_line(
    bncli: Bncli, finished_run: Path, options: tuple[str, ...], said: str
) -> None:
    outcome = bncli("eval", finished_run / "last.pt", "--engine", "onnxruntime", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert said in " ".join(outcome.err.split())
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_openvino_computes_in_either_precision(bncli: Bncli, finished_run: Path, precision: str) -> None:
    pytest.importorskip("openvino")
    options = ("--engine", "openvino", "--set", f"runtime.precision={precision}")
    theirs = evaluated(bncli, finished_run, *options)
    assert theirs["runtime"]["precision"] == precision
    assert theirs["runtime"]["engine"].startswith("OpenVINO ")
    right = evaluated(bncli, finished_run)
    assert theirs["accuracy"] == pytest.approx(right["accuracy"], abs=0.03)
    assert theirs["loss"] == pytest.approx(right["loss"], rel=1e-5 if precision == "float32" else 0.02)


@pytest.mark.slow
def test_any_network_can_be_handed_to_an_engine(bncli: Bncli, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    name = "torchvision:resnet18"
    torch.save(build_network(name, {"num_classes": 10}).state_dict(), tmp_path / "r.pt")
    words = ("eval", tmp_path / "r.pt", "--model", name, "--model-arg", "num_classes=10")
    words += ("--set", "runtime.precision=float32")
    words += ("--set", "data.name=synthetic", "--set", "data.num_test=60", "--normalization", "half", *FEW)
    ours, theirs = bncli(*words, "--json").json, bncli(*words, "--json", "--engine", "onnxruntime").json
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
    assert theirs["loss"] != ours["loss"]
    assert theirs["runtime"]["engine"].startswith("ONNX Runtime ")


def test_the_fastest_is_found_by_turns_and_the_first_call_does_not_count() -> None:
    calls: list[str] = []

    def way(name: str, first: float, later: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            time.sleep(first if calls.count(name) == 1 else later)

        return call

    times = times_in_turns({"a": way("a", 0.02, 0.001), "b": way("b", 0.0, 0.004)}, seconds=0.0)
    assert 0.001 <= times["a"] < 0.02
    assert times["b"] >= 0.004
    assert calls == ["a", "b", *["a", "a", "b", "b"] * 3]
