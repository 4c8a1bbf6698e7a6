"""Checkpoints as real libraries write them, every value against PyTorch itself."""

import copy
import hashlib
import json
import sys
import tarfile
import threading
import zipfile
from collections import OrderedDict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import fsspec
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bncli.batchnorm import LayerStats, read_running_stats
from bncli.checkpoints import open_checkpoint
from bncli.errors import CheckpointError
from bncli.torchvision_compat import import_torchvision

torchvision = import_torchvision()
import timm  # noqa: E402 (it imports torchvision itself)

TENSORS = ("running_mean", "running_var", "weight", "bias")


def used(model: nn.Module) -> nn.Module:
    """With running statistics and weights of its own in every layer."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.random_(1, 1000)
            if module.affine:
                nn.init.normal_(module.weight)
    return model


def small() -> nn.Module:
    return used(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(5))))


def layers_of(path: Path | str, key: str | None = None) -> tuple[LayerStats, ...]:
    with open_checkpoint(path, key) as checkpoint:
        return checkpoint.layers()


def assert_same(found: tuple[LayerStats, ...], expected: tuple[LayerStats, ...]) -> None:
    """Names, types, every number to the bit; momentum and eps where `found` knows them."""
    assert [layer.name for layer in found] == [layer.name for layer in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.num_features == theirs.num_features
        assert ours.num_batches_tracked == theirs.num_batches_tracked
        assert ours.counter_dtype == theirs.counter_dtype
        if ours.hyperparameters_known:
            assert (ours.momentum, ours.eps) == (theirs.momentum, theirs.eps)
        for name in TENSORS:
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert (mine is None) == (other is None), (ours.name, name)
            if mine is not None:
                assert mine.dtype == other.dtype
                assert torch.equal(mine, other)
                assert mine.is_contiguous()


def save(content: object, path: Path, writer: str) -> None:
    if writer == "safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch zip")


WRITERS = ["torch zip", "torch legacy", "safetensors"]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("suffix", ["pt", "tar", "bin"])
def test_a_state_dict_is_read_by_content_whatever_its_suffix(
    tmp_path: Path, writer: str, suffix: str
) -> None:
    model = small()
    path = tmp_path / f"model.{suffix}"
    save(model.state_dict(), path, writer)
    before = hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.kind, checkpoint.key, len(checkpoint.tensors)) == (writer, "", 12)
        for name, value in model.state_dict().items():
            assert torch.equal(checkpoint.tensors[name].read(), value)
        assert_same(checkpoint.layers(), read_running_stats(model.state_dict()))
    assert (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_floating_point_type_keeps_its_bits(tmp_path: Path, writer: str, dtype: torch.dtype) -> None:
    model = small().to(dtype)
    save(model.state_dict(), tmp_path / "model", writer)
    assert_same(layers_of(tmp_path / "model"), read_running_stats(model.state_dict()))


@pytest.mark.parametrize("writer", WRITERS)
def test_the_networks_of_torchvision_and_timm_are_read(tmp_path: Path, writer: str) -> None:
    networks = [
        torchvision.models.resnet18(),
        torchvision.models.mobilenet_v3_small(),
        timm.create_model("efficientnet_lite0"),
    ]
    for index, network in enumerate(networks):
        path = tmp_path / str(index)
        save(used(network).state_dict(), path, writer)
        found, expected = layers_of(path), read_running_stats(network)
        if writer == "safetensors":  # which sorts the names
            expected = tuple(sorted(expected, key=lambda layer: f"{layer.name}."))
        assert_same(found, expected)


@pytest.mark.parametrize("writer", ["torch zip", "torch legacy"])
def test_a_whole_module_is_read_with_its_hyperparameters(tmp_path: Path, writer: str) -> None:
    networks = [
        torchvision.models.resnet18(),
        timm.create_model("resnet10t"),
        nn.Sequential(
            nn.BatchNorm1d(3, momentum=None, eps=0.1),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.InstanceNorm2d(4, track_running_stats=True, affine=True),
            nn.SyncBatchNorm(5, momentum=0.3),
            nn.BatchNorm3d(2, affine=False),
            nn.BatchNorm3d(7, affine=False, track_running_stats=False),
        ),
        nn.BatchNorm1d(3),
    ]
    for index, network in enumerate(networks):
        path = tmp_path / str(index)
        save(used(network), path, writer)
        found = layers_of(path)
        assert all(layer.hyperparameters_known for layer in found)
        assert_same(found, read_running_stats(network))


def test_a_shared_module_is_listed_once_and_a_cycle_ends(tmp_path: Path) -> None:
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.BatchNorm2d(3)))
    torch.save(model, tmp_path / "shared.pt")
    assert [layer.name for layer in layers_of(tmp_path / "shared.pt")] == ["0", "1.1"]
    model[1]._modules["back"] = model
    torch.save(model, tmp_path / "cycle.pt")
    assert [layer.name for layer in layers_of(tmp_path / "cycle.pt")] == ["0", "1.1"]


def test_buffers_that_the_state_dict_leaves_out_are_left_out(tmp_path: Path) -> None:
    model = small()
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    torch.save(model, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        assert list(checkpoint.tensors) == list(model.state_dict())


def save_as_ultralytics(path: Path) -> None:
    """Its classes are to be found only while the file is written."""

    class DetectionModel(nn.Module):
        def __init__(self, variance: float) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03))
            self.model[1].running_var.fill_(variance)
            self.yaml, self.names = {"nc": 80}, {0: "person"}
            self.half()

    content = {"epoch": 7, "model": DetectionModel(2.0), "ema": DetectionModel(3.0), "updates": 9}
    content |= {"optimizer": {"state": {}}, "train_args": {"lr0": 0.01}, "date": "now"}
    module = ModuleType("ultralytics.nn.tasks")
    module.DetectionModel = DetectionModel
    DetectionModel.__module__, DetectionModel.__qualname__ = module.__name__, "DetectionModel"
    parents = {name: ModuleType(name) for name in ("ultralytics", "ultralytics.nn")}
    with patch.dict(sys.modules, parents | {module.__name__: module}):
        torch.save(content, path)


def test_the_layout_of_ultralytics_is_read_without_its_classes(tmp_path: Path) -> None:
    path = tmp_path / "yolo.pt"
    save_as_ultralytics(path)
    with pytest.raises(ModuleNotFoundError, match="ultralytics"):
        torch.load(path, weights_only=False)
    (layer,) = layers_of(path)  # as Ultralytics' own loader: the moving average first
    assert (layer.name, layer.eps, layer.momentum) == ("model.1", 1e-3, 0.03)
    assert layer.running_var.dtype == torch.float16
    assert layer.running_var.tolist() == [3.0] * 4
    assert layers_of(path, "model")[0].running_var.tolist() == [2.0] * 4
    assert not any("ultralytics" in name for name in sys.modules)


def test_the_layout_of_lightning_is_read(tmp_path: Path) -> None:
    model = small()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    content = {
        "epoch": 3,
        "global_step": 30,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": OrderedDict(state),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"lr": 0.1, "path": Path("x")},
    }
    torch.save(content, tmp_path / "epoch.ckpt")
    with open_checkpoint(tmp_path / "epoch.ckpt") as checkpoint:
        assert checkpoint.key == "state_dict"
        assert [(item.key, item.num_batch_norm_layers) for item in checkpoint.candidates] == [
            ("state_dict", 2)
        ]
        assert_same(checkpoint.layers(), read_running_stats(model))


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "net", "module", "params", "checkpoint.model_state_dict"]
)
def test_a_nested_state_dict_is_found(tmp_path: Path, key: str) -> None:
    model = small()
    content: object = model.state_dict()
    for part in reversed(key.split(".")):
        content = {"epoch": 1, part: content, "args": {"lr": 0.1}}
    torch.save(content, tmp_path / "model.pt")
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        assert checkpoint.key == key
        assert_same(checkpoint.layers(), read_running_stats(model))


def test_the_most_layers_win_then_the_moving_average_and_a_key_chooses(tmp_path: Path) -> None:
    teacher, model = small().state_dict(), small().state_dict()
    more = used(nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(3)))).state_dict()
    path = tmp_path / "model.pt"

    def chosen(content: dict[str, object], key: str | None = None) -> str:
        torch.save(content, path)
        with open_checkpoint(path, key) as checkpoint:
            return checkpoint.key

    assert chosen({"model": model, "teacher": teacher}) == "model"
    assert chosen({"model": model, "teacher": teacher}, "teacher") == "teacher"
    assert chosen({"state_dict": model, "state_dict_ema": teacher}) == "state_dict_ema"
    assert chosen({"model": model, "ema": teacher, "big": more}) == "big"
    assert chosen({"model": model, "schema": teacher}) == "model"
    with pytest.raises(CheckpointError, match=r"no tensors under the key 'x'; .*model \(2 BatchNorm"):
        layers_of(path, "x")


class Compiled(nn.Module):
    """The names that torch.compile gives, without compiling."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


def test_prefixes_of_wrappers_are_stripped_when_every_tensor_has_them(tmp_path: Path) -> None:
    model = small()
    wrapped = [nn.DataParallel(model), Compiled(model), Compiled(nn.DataParallel(Compiled(model)))]
    for wrapper in wrapped:
        torch.save(wrapper.state_dict(), tmp_path / "model.pt")
        assert_same(layers_of(tmp_path / "model.pt"), read_running_stats(model))
        torch.save(wrapper, tmp_path / "whole.pt")
        assert_same(layers_of(tmp_path / "whole.pt"), read_running_stats(model))
    # the average has a counter of its own, so its names stay
    torch.save(AveragedModel(model).state_dict(), tmp_path / "ema.pt")
    assert [layer.name for layer in layers_of(tmp_path / "ema.pt")] == ["module.1", "module.2.0"]
    state = {f"net.model.{name}": value for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "habit.pt")
    assert_same(layers_of(tmp_path / "habit.pt"), read_running_stats(model))


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_shards_are_read_by_their_index(tmp_path: Path, library: str) -> None:
    model = small()
    state = model.state_dict()
    halves = [dict(list(state.items())[:5]), dict(list(state.items())[5:])]
    weight_map = {}
    for index, half in enumerate(halves):
        name = f"model-{index}-of-2"
        save(half, tmp_path / name, "safetensors" if library == "safetensors" else "torch zip")
        weight_map |= dict.fromkeys(half, name)
    path = tmp_path / "model.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.kind == f"{library} index"
        assert_same(checkpoint.layers(), read_running_stats(model))
    (tmp_path / "model-1-of-2").unlink()
    with pytest.raises(CheckpointError, match="model-1-of-2: cannot be read: No such file"):
        layers_of(path)


@pytest.mark.parametrize("name", ["../model", "/etc/passwd", "a/b", "..", "", "s3://bucket/x"])
def test_an_index_reaches_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "deep").mkdir()
    safetensors.torch.save_file(small().state_dict(), tmp_path / "model")
    path = tmp_path / "deep" / "x.index.json"
    path.write_text(json.dumps({"weight_map": {"1.running_mean": name}}))
    with pytest.raises(CheckpointError, match="no plain name of a file beside it"):
        layers_of(path)


def test_torchscript_is_read(tmp_path: Path) -> None:
    model = small().eval()
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(model), tmp_path / "script.pt")
    with open_checkpoint(tmp_path / "script.pt") as checkpoint:
        assert checkpoint.kind == "torchscript"
        assert_same(checkpoint.layers(), read_running_stats(model))


def test_a_view_into_a_huge_storage_costs_only_its_own_bytes(tmp_path: Path) -> None:
    flat = torch.randn(3_000_000)
    state = {
        "bn.running_mean": flat[1_000_000:1_000_064],
        "bn.running_var": flat[2_000_000:2_000_128:2],
        "bn.weight": torch.ones(1).expand(64),
        "bn.bias": flat[64:128],
    }
    for writer in ("torch zip", "torch legacy"):
        path = tmp_path / writer
        save(state, path, writer)
        with open_checkpoint(path) as checkpoint:
            (layer,) = checkpoint.layers()
            for name in TENSORS:
                assert torch.equal(getattr(layer, name), state[f"bn.{name}"])
            assert len(checkpoint.tensors["bn.running_mean"].read().untyped_storage()) == 256


def test_a_compressed_archive_is_read_and_a_wrong_checksum_noticed(tmp_path: Path) -> None:
    model = small()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    source = zipfile.ZipFile(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    assert_same(layers_of(tmp_path / "packed.pt"), read_running_stats(model))
    data = bytearray((tmp_path / "model.pt").read_bytes())
    place = data.index(model[1].running_var.numpy().tobytes())
    data[place] ^= 1
    (tmp_path / "flipped.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        layers_of(tmp_path / "flipped.pt")


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    model = small()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(layers_of(tmp_path / "model.pt"), read_running_stats(model))


def test_bnclis_own_checkpoint_tells_momentum_and_eps_and_builds_no_network(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bncli.checkpoints import load_model

    expected = read_running_stats(load_model(finished_run / "last.pt"))
    monkeypatch.setattr("bncli.checkpoints.own.build_configured", None)
    found = layers_of(finished_run / "last.pt")
    assert all(layer.hyperparameters_known for layer in found)
    assert_same(found, expected)
    content = torch.load(finished_run / "last.pt", weights_only=True)
    content["config"]["model"]["batch_norm"].update(track_running_stats=False, momentum=None, eps=0.5)
    state = content["state_dict"]
    for name in [name for name in state if "running" in name or "tracked" in name]:
        del state[name]
    torch.save(content, tmp_path / "without.pt")
    found = layers_of(tmp_path / "without.pt")
    assert [(layer.name, layer.num_features) for layer in found] == [
        (layer.name, layer.num_features) for layer in expected
    ]
    for layer, other in zip(found, expected, strict=True):
        assert (layer.running_mean, layer.momentum, layer.eps) == (None, None, 0.5)
        assert torch.equal(layer.weight, other.weight)


def test_urls_are_opened_by_fsspec(tmp_path: Path) -> None:
    model = small()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with fsspec.open("memory://bucket/model.pt", "wb") as file:
        file.write((tmp_path / "model.pt").read_bytes())
    assert_same(layers_of("memory://bucket/model.pt"), read_running_stats(model))
    assert_same(layers_of(f"file://{tmp_path}/model.pt"), read_running_stats(model))
    for url in ("memory://bucket/missing.pt", "nothing://x", "file:///nowhere/x.pt", "s3://"):
        with pytest.raises(CheckpointError, match=r"cannot be read|there is no such file") as caught:
            layers_of(url)
        assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    import os

    torch.save({"a": {"weight": torch.zeros(3), "bias": torch.zeros(3)}, "b": 3}, tmp_path / "plain.pt")
    with pytest.raises(
        CheckpointError, match=r"no BatchNorm layer .* but 2 tensors under a, such as weight, b"
    ):
        layers_of(tmp_path / "plain.pt")
    torch.save([1, "two"], tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="no tensor at all"):
        layers_of(tmp_path / "none.pt")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "none.pt", "none.pt")
    with pytest.raises(CheckpointError, match="tar archive"):
        layers_of(tmp_path / "a.tar")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CheckpointError, match=r"a zip archive with hello\.txt; bncli reads"):
        layers_of(tmp_path / "b.zip")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="neither a file nor a URL"):
        layers_of(tmp_path / "pipe")
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(CheckpointError, match="no index of shards"):
        layers_of(tmp_path / "x.json")


def test_numbers_as_keys_are_places_like_any_other(tmp_path: Path) -> None:
    model = small()
    torch.save({"models": {0: {"epoch": 1}, 1: model.state_dict()}}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert checkpoint.key == "models.1"
        assert_same(checkpoint.layers(), read_running_stats(model))
    torch.save({0: torch.zeros(2), 1: torch.zeros(2)}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="but 2 tensors, such as 0, 1"):
        layers_of(tmp_path / "b.pt")


def test_integer_or_complex_tensors_are_no_running_statistics(tmp_path: Path) -> None:
    state = copy.deepcopy(small().state_dict())
    state["1.running_mean"] = state["1.running_mean"].long()
    state["2.0.bias"] = state["2.0.bias"].to(torch.complex64)
    torch.save(state, tmp_path / "odd.pt")
    (layer,) = layers_of(tmp_path / "odd.pt")
    assert (layer.name, layer.bias) == ("2.0", None)


def test_a_server_without_ranges_or_without_the_file_is_told_as_such(tmp_path: Path) -> None:
    """As Python's own http.server answers."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            for name, message in (
                ("a.pt", "its server does not give parts of a file; download it first"),
                ("b.pt", "there is no such file, or no such server"),
            ):
                url = f"http://127.0.0.1:{server.server_port}/{name}"
                with pytest.raises(CheckpointError) as caught, open_checkpoint(url):
                    pass
                assert str(caught.value) == f"{url}: {message}"
        finally:
            server.shutdown()
            thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
