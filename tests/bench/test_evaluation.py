import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bncli.bench.alone import Specification, start_alone
from bncli.bench.evaluation import (
    EvaluationBench,
    PathSpeed,
    _in_turns,
    _ratio,
)
from bncli.bench.network_source import NetworkSource
from bncli.bench.ways import (
    BFLOAT16,
    COMPILED,
    EXPORTED,
    FLOAT32,
    FOLDED,
    ONNX,
    OPENVINO,
    OURS,
    PLAIN,
    ways_of_checkpoint,
)
from bncli.checkpoints import load_model
from bncli.config import RuntimeConfig
from bncli.errors import BncliError
from bncli.hardware import has_fast_bfloat16
from bncli.runtime import resolve_runtime
from tests.conftest import Bncli
from tests.missing_packages import without

FEW = ("--rounds", 2, "--batches", 1, "--calls", 3, "--batch-size", 50, "--starts", 0)


def test_every_path_has_its_speed_its_ratios_and_its_flips(bncli: Bncli, finished_run: Path) -> None:
    pytest.importorskip("onnxruntime")
    outcome = bncli("bench", "eval", finished_run / "last.pt", *FEW, "--json")
    assert outcome.code == 0
    result = outcome.json
    paths = {path["name"]: path for path in result["paths"]}
    assert list(paths) == [PLAIN, OURS, FOLDED, ONNX, OPENVINO]
    if importlib.util.find_spec("openvino") is None:
        assert paths.pop(OPENVINO)["how"] == "openvino is not installed: pip install 'bncli[openvino]'"
    for path in paths.values():
        assert path["images_per_second"] > 0
        assert 0 < path["latency_median_ms"] <= path["latency_p99_ms"]
        for key in ("throughput_ratio", "throughput_ratio_to_onnx", "latency_ratio", "latency_ratio_to_onnx"):
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
    without(monkeypatch, "onnxruntime")
    outcome = bncli("bench", "eval", finished_run / "last.pt", *FEW)
    assert outcome.code == 0
    assert "onnxruntime is not installed: pip install 'bncli[onnx]'" in outcome.out
    assert "medians of 2 rounds" in outcome.out


def test_all_ways_compute_the_same_network(finished_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = finished_run / "last.pt"
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    oracle = load_model(path).double()(images)  # float64
    for precision, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
        runtime = resolve_runtime(RuntimeConfig(device="cpu", precision=precision))
        # engines get another number of images than they were exported with
        source = NetworkSource(str(path))
        ways = ways_of_checkpoint(source, images[:2], runtime, tmp_path, compiles=False)
        assert [way.name for way in ways] == [PLAIN, OURS, FOLDED, ONNX, OPENVINO]
        for way in ways:
            if way.classify is not None:
                error = (way.classify(images) - oracle).abs().max() / oracle.abs().max()
                assert error < (tolerance if way.name in {OURS, FOLDED, OPENVINO} else 1e-5), way.name


def a_path(name: str, rate: float, ms: float, flips: float) -> PathSpeed:
    return PathSpeed(name, "", images_per_second=rate, latency_median_ms=ms, prediction_flips=flips)


def test_what_to_use_is_named_among_the_ways_that_change_hardly_any_prediction() -> None:
    onnx = a_path(ONNX, 20, 4, 0.002)
    paths = [a_path("a", 10, 3, 0), onnx, a_path("c", 90, 1, 0.003), PathSpeed("d", "")]

    def verdict(*chosen: PathSpeed) -> str:
        return EvaluationBench(tuple(chosen), 1, 1, 1, 1, 0, 1, None, {}, {}).verdict

    how = "(ONNX Runtime: --engine onnxruntime)"
    assert verdict(*paths) == f"Use a here for single images, and ONNX Runtime for batches {how}."
    assert verdict(paths[0]) == "Use a here, for single images and for batches."
    assert verdict(onnx) == "Use ONNX Runtime here, for single images and for batches."


def test_an_exported_file_is_timed_by_its_own_engine(
    bncli: Bncli, finished_run: Path, tmp_path: Path
) -> None:
    assert bncli("export", finished_run / "last.pt", "-o", tmp_path / "a.pt2", "--num-images", 8).code == 0
    result = bncli("bench", "eval", tmp_path / "a.pt2", *FEW, "--json").json
    (path,) = result["paths"]
    assert path["name"] == EXPORTED
    assert path["images_per_second"] > 0
    assert path["first_answer_seconds"] is None
    outcome = bncli("bench", "eval", tmp_path / "a.pt2", *FEW, "--device", "cpu")
    assert (outcome.code, "it is computed on the CPU" in outcome.err) == (2, True)


NETS = """
from torch import nn

def make(width=4):
    layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(900 * width, 3))

class Depends(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

def branching():
    return nn.Sequential(make(), Depends())
"""


def foreign_checkpoint(folder: Path, factory: str, **arguments: int) -> tuple[object, ...]:
    """What is given to `bench eval` for a stranger's file, with images in a folder."""
    (folder / "nets.py").write_text(NETS)
    namespace: dict[str, Any] = {}
    exec(NETS, namespace)
    network = namespace[factory](**arguments).train()
    network(torch.rand(8, 3, 32, 32))
    torch.save({"net": network.state_dict()}, folder / "net.pt")
    for split in ("train", "test"):
        for index in range(3):
            place = folder / "pics" / split / f"class{index}"
            place.mkdir(parents=True)
            for shade in range(2):
                Image.new("RGB", (32, 32), (90 * index, 40 * shade, 7)).save(place / f"{shade}.png")
    words = ("bench", "eval", folder / "net.pt", "--model", f"{folder / 'nets.py'}:{factory}", "--key", "net")
    return (*words, "--data-root", folder / "pics", "--set", "data.image_size=32", *FEW)


@pytest.mark.slow
def test_a_strangers_network_is_timed_as_well(bncli: Bncli, tmp_path: Path) -> None:
    words = foreign_checkpoint(tmp_path, "make", width=5)
    result = bncli(*words, "--model-arg", "width=5", "--json").json
    paths = {path["name"]: path for path in result["paths"]}
    assert list(paths) == [PLAIN, OURS, FOLDED, ONNX, OPENVINO]
    for path in paths.values():
        if path["images_per_second"] is not None:
            assert path["num_flips"] == 0
    assert result["num_test_images"] == 6


def test_a_network_that_no_engine_takes_is_timed_without(bncli: Bncli, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    outcome = bncli(*foreign_checkpoint(tmp_path, "branching"), "--json")
    assert outcome.code == 0, outcome.err
    paths = {path["name"]: path for path in outcome.json["paths"]}
    assert "depends on the numbers in an image" in paths[ONNX]["how"]
    assert paths[ONNX]["images_per_second"] is None
    assert paths[FOLDED]["images_per_second"] > 0
    outcome = bncli("bench", "eval", tmp_path / "net.pt", *FEW)
    assert (outcome.code, "name its network with --model" in outcome.err) == (2, True)


@pytest.mark.slow
def test_a_strangers_network_starts_in_a_process_of_its_own(bncli: Bncli, tmp_path: Path) -> None:
    words = foreign_checkpoint(tmp_path, "make")[:-1]
    paths = bncli(*words, 1, "--json").json["paths"]
    assert all(0 < path["first_answer_seconds"] < 60 for path in paths if path["images_per_second"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "names"), [("onnx", [ONNX, FLOAT32, BFLOAT16]), ("xml", [FLOAT32, BFLOAT16])]
)
def test_openvino_is_timed_on_files_that_it_reads(
    bncli: Bncli, finished_run: Path, tmp_path: Path, suffix: str, names: list[str]
) -> None:
    for package in ("onnxruntime", "openvino"):
        pytest.importorskip(package)
    file = tmp_path / f"a.{suffix}"
    assert bncli("export", finished_run / "last.pt", "-o", file, "--num-images", 8).code == 0
    found = bncli("bench", "eval", file, *FEW[:-1], 1, "--json").json["paths"]
    expected = names if has_fast_bfloat16(torch.device("cpu")) else names[:-1]
    assert [path["name"] for path in found] == expected
    assert found[-1]["prediction_flips"] <= 0.05
    assert all(0 < path["first_answer_seconds"] < 60 for path in found)


@pytest.mark.slow
def test_every_way_starts_in_a_process_of_its_own(bncli: Bncli, finished_run: Path) -> None:
    result = bncli("bench", "eval", finished_run / "last.pt", *FEW[:-1], 1, "--json").json
    paths = {path["name"]: path for path in result["paths"] if path["images_per_second"]}
    assert result["num_starts"] == 1
    for path in paths.values():
        assert 0 < path["first_answer_seconds"] < 60
        assert path["first_answer_ratio"]["median"] > 0
        assert 20 < path["peak_mib"] < 2000
    if ONNX in paths:  # it needs no PyTorch
        assert paths[ONNX]["peak_mib"] < paths[PLAIN]["peak_mib"]


@pytest.mark.slow
def test_a_process_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    file = str(tmp_path / "no.pt")
    nowhere = Specification(file, "plain", 1, runtime={}, network={"file": file})
    with pytest.raises(BncliError, match=r"^plain in a process of its own failed: [^\n]*no\.pt[^\n]*$"):
        start_alone(nowhere, (3, 32, 32), 2)


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
