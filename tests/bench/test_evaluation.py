import importlib.util
import time
from pathlib import Path

import pytest
import torch

from bncli.bench import evaluation
from bncli.bench.evaluation import (
    COMPILED,
    FOLDED,
    ONNX,
    OPENVINO,
    OURS,
    PLAIN,
    EvaluationBench,
    PathSpeed,
    _in_turns,
    _paths,
    _ratio,
)
from bncli.checkpoints import load_checkpoint, load_model
from bncli.config import RuntimeConfig
from bncli.runtime import resolve_runtime
from tests.conftest import Bncli

FEW = ("--rounds", 2, "--batches", 1, "--calls", 3, "--batch-size", 50)


def test_every_path_has_its_speed_its_ratios_and_its_flips(bncli: Bncli, finished_run: Path) -> None:
    pytest.importorskip("onnxruntime")
    outcome = bncli("bench", "eval", finished_run / "last.pt", *FEW, "--json")
    assert outcome.code == 0
    result = outcome.json
    paths = {path["name"]: path for path in result["paths"]}
    assert list(paths) == [PLAIN, OURS, FOLDED, ONNX, OPENVINO]
    if importlib.util.find_spec("openvino") is None:
        assert paths.pop(OPENVINO)["how"] == "not installed: pip install 'bncli[openvino]'"
    for path in paths.values():
        assert path["images_per_second"] > 0
        assert 0 < path["latency_median_ms"] <= path["latency_p99_ms"]
        for key in ("throughput_ratio", "latency_ratio", "latency_ratio_to_onnx"):
            assert 0 < path[key]["min"] <= path[key]["median"] <= path[key]["max"]
        assert path["prediction_flips"] == path["num_flips"] / 120
    assert paths[PLAIN]["throughput_ratio"] == {"median": 1, "min": 1, "max": 1}
    assert paths[PLAIN]["num_flips"] == 0
    assert (result["num_rounds"], result["batch_size"], result["num_test_images"]) == (2, 50, 120)
    assert result["runtime"]["precision"] == "float32"
    assert result["machine"]["torch"] == str(torch.__version__)


def test_without_onnx_runtime_its_row_says_so(
    bncli: Bncli, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "missing_packages", lambda: ("onnxruntime",))
    outcome = bncli("bench", "eval", finished_run / "last.pt", *FEW)
    assert outcome.code == 0
    assert "not installed: pip install onnxruntime" in outcome.out
    assert "medians of 2 rounds" in outcome.out


def test_a_package_that_is_not_there_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else object())
    assert evaluation.missing_packages() == ("onnx",)


def test_all_paths_compute_the_same_network(finished_run: Path) -> None:
    pytest.importorskip("onnxruntime")
    checkpoint = load_checkpoint(finished_run / "last.pt")
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    oracle = load_model(checkpoint).double()(images)  # float64
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
        runtime = resolve_runtime(RuntimeConfig(device="cpu", precision=precision))
        paths, _, _ = _paths(checkpoint, images[:2], runtime)
        for name, classify in paths.items():
            error = (classify(images) - oracle).abs().max() / oracle.abs().max()
            assert error < (tolerance if name in {OURS, FOLDED} else 1e-5), name
    assert error < 1e-5  # the last is ONNX Runtime, of another number of images than it was exported with


def a_path(name: str, rate: float, ms: float, flips: float) -> PathSpeed:
    return PathSpeed(name, "", images_per_second=rate, latency_median_ms=ms, prediction_flips=flips)


def test_the_fastest_is_named_among_those_that_change_hardly_any_prediction() -> None:
    paths = [a_path("a", 10, 3, 0), a_path("b", 20, 4, 0.002), a_path("c", 90, 1, 0.003), PathSpeed("d", "")]

    def verdict(*chosen: PathSpeed) -> str:
        return EvaluationBench(tuple(chosen), 1, 1, 1, 1, 1, None, {}, {}).verdict

    assert verdict(*paths) == "The fastest here is b for batches, and a for single images."
    assert verdict(paths[0]) == "The fastest here is a, for batches and for single images."


@pytest.mark.slow
# PyTorch warns of itself where its compiler is imported
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torch_compile_is_timed_on_request(bncli: Bncli, finished_run: Path) -> None:
    result = bncli("bench", "eval", finished_run / "last.pt", *FEW, "--compile", "--json").json
    (path,) = (path for path in result["paths"] if path["name"] == COMPILED)
    assert path["images_per_second"] > 0
    assert path["num_flips"] == 0


def test_ratios_are_taken_within_a_round() -> None:
    ratio = _ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert (ratio.median, ratio.min, ratio.max) == (3, 2, 4)


def test_the_slower_path_takes_its_time_and_turns_change_their_order() -> None:
    turns: list[str] = []

    def slow(images: torch.Tensor) -> torch.Tensor:
        turns.append("slow")
        time.sleep(0.002)
        return images

    def fast(images: torch.Tensor) -> torch.Tensor:
        turns.append("fast")
        return images

    images = torch.zeros(3, 1)
    found = _in_turns({"slow": slow, "fast": fast}, images, 2, 7, 1, 4, lambda _: None)
    assert {name: len(rounds) for name, rounds in found.items()} == {"slow": 2, "fast": 2}
    assert all(len(one.latencies) == 4 and min(one.latencies) >= 2 for one in found["slow"])
    assert max(one.images_per_second for one in found["slow"]) <= 7 / 0.002
    each_turn = [name for name, before in zip(turns, [None, *turns], strict=False) if name != before]
    assert each_turn == ["fast", "slow", "fast", "slow"]


def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(bncli: Bncli, tmp_path: Path) -> None:
    path = tmp_path / "no.pt"
    path.write_text("no checkpoint")
    outcome = bncli("bench", "eval", path)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert str(path) in outcome.err
    assert outcome.out == ""
