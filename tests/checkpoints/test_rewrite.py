"""Checkpoints of many kinds, written again with other running statistics: PyTorch itself reads both."""

import io
import json
import os
import random
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from bncli.batchnorm import recalibrate
from bncli.batchnorm.bits import bitwise_equal
from bncli.checkpoints import (
    check_rewritable,
    load_weights,
    open_checkpoint,
    rewrite,
    statistics_in_file,
)
from bncli.checkpoints.formats import torch_pickle
from bncli.errors import BncliError, CheckpointError
from tests.conftest import Bncli

LAYER = "1"  # the BatchNorm layer of `network` that gets new statistics; "2.0" keeps its own
CHANNELS = 5


def network() -> nn.Sequential:
    """Two BatchNorm layers, with statistics of their own."""
    model = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3),
        nn.BatchNorm2d(CHANNELS),
        nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU()),
    )
    for _ in range(3):
        model(torch.randn(8, 3, 6, 6))
    return model


def new_buffers(prefix: str = "", layer: str = LAYER) -> dict[str, Tensor]:
    path = f"{prefix}{layer}."
    return {
        f"{path}running_mean": torch.randn(CHANNELS, dtype=torch.float64),
        f"{path}running_var": torch.rand(CHANNELS, dtype=torch.float64) + 0.5,
        f"{path}num_batches_tracked": torch.tensor(123_456_789),
    }


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that a loaded file holds, modules and other objects by their attributes."""
    if isinstance(value, torch.jit.ScriptModule):
        yield from leaves(dict(value.state_dict()), name)
    elif isinstance(value, nn.Module | SimpleNamespace):
        yield name, type(value)
        yield from leaves(vars(value), name)
    elif isinstance(value, dict):
        yield name, (type(value), list(value))
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        yield name, (type(value), len(value))
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}.{index}".lstrip("."))
    else:
        yield name, value


def assert_same_but(before: Any, after: Any, expected: dict[str, Tensor]) -> None:
    """The two are alike, tensors bit by bit, but for `expected`, whose values are the new ones."""
    old, new = list(leaves(before)), list(leaves(after))
    assert [name for name, _ in old] == [name for name, _ in new]
    assert set(expected) <= {name for name, _ in old}
    for (name, first), (_, second) in zip(old, new, strict=True):
        assert type(first) is type(second)
        if isinstance(first, Tensor):
            wanted = expected[name].to(first.dtype) if name in expected else first
            assert bitwise_equal(second, wanted), name
            assert first.stride() == second.stride()
            assert first.requires_grad == second.requires_grad
            if name in expected:
                assert not torch.equal(first, second), name  # or the test could not fail
        else:
            assert first == second, name


# ---- containers: each writes a file and tells the key, the prefix, and what stands before names once loaded


def save_state_dict(path: Path) -> tuple[str, str, str]:
    torch.save(network().state_dict(), path)
    return "", "", ""


def save_lightning_like(path: Path) -> tuple[str, str, str]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": OrderedDict((f"model.{name}", tensor) for name, tensor in model.state_dict().items()),
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hyper_parameters": SimpleNamespace(widths=(1, 2), name="net"),
    }
    torch.save(content, path)
    return "state_dict", "model.", "state_dict.model."


def save_with_average(path: Path) -> tuple[str, str, str]:
    """The layer is there twice; `model` is asked for, where the rule would choose the average."""
    torch.save({"model": network().state_dict(), "model_ema": network().state_dict()}, path)
    return "model", "", "model."


def save_prefixed(path: Path) -> tuple[str, str, str]:
    model = nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": network()})})
    torch.save(model.state_dict(), path)
    return "", "module._orig_mod.", "module._orig_mod."


def save_as(dtype: torch.dtype) -> Callable[[Path], tuple[str, str, str]]:
    def save(path: Path) -> tuple[str, str, str]:
        torch.save({"model": network().to(dtype).state_dict()}, path)
        return "model", "", "model."

    return save


def save_legacy(path: Path) -> tuple[str, str, str]:
    content = {"model": network().state_dict(), "more": [torch.arange(7), "text"]}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return "model", "", "model."


def save_without_checksums(path: Path) -> tuple[str, str, str]:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(network().state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    return "", "", ""


def save_views(path: Path) -> tuple[str, str, str]:
    """All numbers of a type lie in one storage, one tensor after another."""
    state = network().double().state_dict()
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    flat = torch.cat([tensor.flatten() for tensor in floats.values()])
    views = dict(zip(floats, flat.split([tensor.numel() for tensor in floats.values()]), strict=True))
    torch.save(
        {name: views[name].view_as(tensor) if name in views else tensor for name, tensor in state.items()},
        path,
    )
    return "", "", ""


def save_interleaved(path: Path) -> tuple[str, str, str]:
    """Mean and variance are the columns of one matrix: views with gaps."""
    state = network().state_dict()
    both = torch.stack([state["1.running_mean"], state["1.running_var"]], dim=1)
    torch.save({**state, "1.running_mean": both[:, 0], "1.running_var": both[:, 1]}, path)
    return "", "", ""


def save_module(path: Path) -> tuple[str, str, str]:
    torch.save(network(), path)
    return "", "", ""


def save_module_in_dict(path: Path) -> tuple[str, str, str]:
    torch.save({"epoch": 1, "model": network().half(), "ema": None}, path)
    return "model", "", ""


def save_script(path: Path) -> tuple[str, str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(network()).save(path)
    return "", "", ""


def repack(path: Path, compressed: Callable[[str], bool], **options: bool) -> None:
    """Write a zip archive again with Python's zipfile, which puts checksums before the entries."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED if compressed(name) else zipfile.ZIP_STORED
            with archive.open(info, "w", **options) as file:
                file.write(data)


def save_repacked(path: Path) -> tuple[str, str, str]:
    """The pickle and the convolution's weights are compressed, and all entries have the fields of zip64."""
    torch.save(network().state_dict(), path)
    repack(path, lambda name: name.endswith(("data.pkl", "data/0")), force_zip64=True)
    return "", "", ""


TORCH = {
    "state dict": save_state_dict,
    "Lightning": save_lightning_like,
    "average beside": save_with_average,
    "prefixes": save_prefixed,
    "float16": save_as(torch.float16),
    "bfloat16": save_as(torch.bfloat16),
    "float64": save_as(torch.float64),
    "legacy": save_legacy,
    "no checksums": save_without_checksums,
    "views": save_views,
    "interleaved": save_interleaved,
    "module": save_module,
    "module in a dict": save_module_in_dict,
    "TorchScript": save_script,
    "repacked": save_repacked,
}
SAFE = {"state dict", "average beside", "prefixes", "float16", "bfloat16", "float64", "legacy", "views"}


def load(path: Path, *, weights_only: bool) -> Any:
    with path.open("rb") as file:
        if path.stem == "TorchScript":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                return torch.jit.load(file)
        return torch.load(file, weights_only=weights_only)


def place_of(values: dict[str, Tensor], name: str, prefix: str, place: str) -> dict[str, Tensor]:
    """The new values by their place in what `leaves` shows of the loaded file."""
    if not name.startswith("module"):
        return {f"{place}{key.removeprefix(prefix)}": value for key, value in values.items()}
    inside = "" if name == "module" else "model."
    return {
        f"{inside}_modules.{key.rpartition('.')[0]}._buffers.{key.rpartition('.')[2]}": value
        for key, value in values.items()
    }


@pytest.mark.parametrize("name", TORCH)
def test_pytorch_finds_the_new_values_and_all_else_as_it_was(tmp_path: Path, name: str) -> None:
    source, target = tmp_path / f"{name}.pt", tmp_path / "new" / f"{name}.pt"
    target.parent.mkdir()
    key, prefix, place = TORCH[name](source)
    before = source.read_bytes()
    values = new_buffers(prefix)
    rewrite(source, target, values, key=key)
    for weights_only in (False, True) if name in SAFE else (False,):
        first, second = (load(path, weights_only=weights_only) for path in (source, target))
        assert_same_but(first, second, place_of(values, name, prefix, place))
    assert source.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("name", TORCH)
def test_the_own_reader_finds_the_new_values(tmp_path: Path, name: str, bncli: Bncli) -> None:
    source, target = tmp_path / "old.pt", tmp_path / "new.pt"
    key, prefix, _ = TORCH[name](source)
    with open_checkpoint(source, key) as checkpoint:
        assert checkpoint.prefix == prefix
        assert checkpoint.is_whole_module == (name in {"module", "module in a dict", "TorchScript"})
        old = {layer.name: layer for layer in checkpoint.layers()}
    values = new_buffers(checkpoint.prefix)
    rewrite(source, target, values, key=checkpoint.key)
    with open_checkpoint(target, key) as checkpoint:
        new = {layer.name: layer for layer in checkpoint.layers()}
    assert list(old) == list(new) == [LAYER, "2.0"]
    wanted = values[f"{prefix}{LAYER}.running_var"].to(old[LAYER].running_var.dtype)
    assert torch.equal(new[LAYER].running_var, wanted)
    assert new[LAYER].num_batches_tracked == 123_456_789
    assert torch.equal(new["2.0"].running_var, old["2.0"].running_var)
    shown = bncli("inspect-stats", str(target), "--key", key, "--json")
    assert shown.code in (0, 1)
    assert shown.json["layers"][0]["num_batches_tracked"] == 123_456_789


@pytest.mark.parametrize("name", [name for name in TORCH if name != "legacy"])
def test_only_the_entries_of_the_buffers_differ_and_every_checksum_fits(tmp_path: Path, name: str) -> None:
    source, target = tmp_path / "old.pt", tmp_path / "new.pt"
    key, prefix, _ = TORCH[name](source)
    rewrite(source, target, new_buffers(prefix), key=key)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target) as new:
        if name != "no checksums":
            assert new.testzip() is None
        # name, place, sizes and flags of each
        assert [(info.filename, info.header_offset, info.compress_size) for info in old.infolist()] == [
            (info.filename, info.header_offset, info.compress_size) for info in new.infolist()
        ]
        checked = [info for info in old.infolist() if name != "no checksums"]
        different = [info.filename for info in checked if old.read(info) != new.read(info.filename)]
    assert all("/data/" in entry for entry in different)
    assert len(different) in ({"views": [2], "interleaved": [2], "no checksums": [0]}.get(name, [3]))
    # the headers before and behind the entries, which zipfile does not compare with its directory
    if name in {"state dict", "repacked", "TorchScript"}:
        _check_local_checksums(target.read_bytes(), target)


def _check_local_checksums(data: bytes, path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    for info in infos:
        flags, checksum, size, extra = struct.unpack_from("<6xH6xL8xHH", data, info.header_offset)
        end = info.header_offset + 30 + size + extra + info.compress_size
        if flags & 8:
            assert data[end : end + 4] == b"PK\x07\x08"
            checksum = struct.unpack_from("<L", data, end + 4)[0]
        assert checksum == info.CRC


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_keeps_its_metadata_and_every_other_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    source, target = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    metadata = {"format": "pt", "author": "Zoë", "architecture": "net"}
    state = {f"model.{name}": tensor for name, tensor in network().to(dtype).state_dict().items()}
    safetensors.torch.save_file(state, source, metadata)
    values = new_buffers("model.")
    rewrite(source, target, values)
    assert_same_but(safetensors.torch.load_file(source), safetensors.torch.load_file(target), values)
    with safetensors.safe_open(target, "pt") as file:
        assert file.metadata() == metadata
    length = 8 + int.from_bytes(source.read_bytes()[:8], "little")
    assert source.read_bytes()[:length] == target.read_bytes()[:length]


def test_a_file_without_new_buffers_is_copied(tmp_path: Path) -> None:
    save_lightning_like(tmp_path / "old.pt")
    rewrite(tmp_path / "old.pt", tmp_path / "new.pt", {})
    assert (tmp_path / "new.pt").read_bytes() == (tmp_path / "old.pt").read_bytes()


def test_old_values_written_back_give_the_old_file(tmp_path: Path) -> None:
    save_views(tmp_path / "old.pt")
    old = torch.load(tmp_path / "old.pt")
    rewrite(tmp_path / "old.pt", tmp_path / "new.pt", new_buffers())
    rewrite(tmp_path / "new.pt", tmp_path / "again.pt", {name: old[name] for name in new_buffers()})
    assert (tmp_path / "new.pt").read_bytes() != (tmp_path / "old.pt").read_bytes()
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "old.pt").read_bytes()


def test_values_are_rounded_to_the_nearest_of_the_files_type(tmp_path: Path) -> None:
    save_as(torch.bfloat16)(tmp_path / "old.pt")
    exact = torch.tensor([1.0, 1.001, 1.003, 1.005, -3.3e38], dtype=torch.float64)
    rewrite(tmp_path / "old.pt", tmp_path / "new.pt", {"1.running_mean": exact})
    found = torch.load(tmp_path / "new.pt")["model"]["1.running_mean"]
    # bfloat16 has steps of 2^-7 above 1, so 1.003 lies nearer to 1 and 1.005 nearer to 1 + 2^-7
    assert found[:4].tolist() == [1.0, 1.0, 1.0, 1.0078125]
    assert found.isfinite().all()


def test_a_layer_under_two_names_is_changed_when_both_are_given(tmp_path: Path) -> None:
    model = network()
    tied = nn.Sequential(model[1], model[1])
    torch.save(tied.state_dict(), tmp_path / "old.pt")
    new = torch.arange(5.0)
    names = ["0.running_mean", "1.running_mean"]
    text = refusal(tmp_path, "old.pt", {names[0]: new})
    assert text.startswith("0.running_mean shares its memory in the file with 1.running_mean, which would ")
    text = refusal(tmp_path, "old.pt", {names[0]: new, names[1]: new + 1})
    assert text.startswith(
        "0.running_mean shares its memory in the file with 1.running_mean, which would get "
    )
    rewrite(tmp_path / "old.pt", tmp_path / "new.pt", dict.fromkeys(names, new))
    found = torch.load(tmp_path / "new.pt")
    assert_same_but(torch.load(tmp_path / "old.pt"), found, dict.fromkeys(names, new))


def test_a_counter_of_an_early_pytorch_keeps_its_shape(tmp_path: Path) -> None:
    state = network().state_dict()
    state["1.num_batches_tracked"] = torch.tensor([3])
    torch.save(state, tmp_path / "old.pt")
    rewrite(tmp_path / "old.pt", tmp_path / "new.pt", {"1.num_batches_tracked": torch.tensor(7)})
    assert torch.load(tmp_path / "new.pt")["1.num_batches_tracked"].tolist() == [7]


def test_the_copy_is_whole_where_the_system_stops_copying_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state_dict(tmp_path / "old.pt")
    sizes = iter([1000, 7])

    def copy(source: int, target: int, count: int, *offsets: int) -> int:
        size = next(sizes, None)
        if size is None:
            raise OSError(18, "Invalid cross-device link")
        os.pwrite(target, os.pread(source, size, offsets[0]), offsets[1])
        return size

    monkeypatch.setattr(os, "copy_file_range", copy)
    rewrite(tmp_path / "old.pt", tmp_path / "new.pt", {})
    assert (tmp_path / "new.pt").read_bytes() == (tmp_path / "old.pt").read_bytes()
    assert next(sizes, None) is None


@pytest.mark.parametrize("name", ["Lightning", "prefixes", "module in a dict"])
def test_a_network_that_was_loaded_and_recalibrated_goes_back_into_its_file(
    tmp_path: Path, name: str
) -> None:
    source, target = tmp_path / "old.pt", tmp_path / "new.pt"
    key = TORCH[name](source)[0]
    model = network()
    loaded = load_weights(model, source, key=key)
    check_rewritable(source, statistics_in_file(model, loaded, [LAYER, "2.0"]), loaded.key)
    before = {entry: value.clone() for entry, value in model.state_dict().items()}
    recalibrate(model, torch.randn(64, 3, 6, 6).split(16))
    rewrite(source, target, statistics_in_file(model, loaded, [LAYER]), loaded.key)
    again = network()
    load_weights(again, target, key=key)
    for entry, value in again.state_dict().items():
        wanted = before[entry]
        if entry in (f"{LAYER}.running_mean", f"{LAYER}.running_var"):
            assert not torch.equal(value, wanted)
            wanted = model.state_dict()[entry]
            if name == "module in a dict":
                wanted = wanted.half().float()  # as in the file
        assert torch.equal(value, wanted), entry


def test_a_tied_layer_gets_its_statistics_under_all_its_names(tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(CHANNELS)
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), norm, nn.ReLU(), norm)
    torch.save(model.state_dict(), tmp_path / "old.pt")
    loaded = load_weights(model, tmp_path / "old.pt")
    norm.running_mean.fill_(3)
    buffers = statistics_in_file(model, loaded, ["1"])
    assert list(buffers) == ["1.running_mean", "1.running_var", "3.running_mean", "3.running_var"]
    rewrite(tmp_path / "old.pt", tmp_path / "new.pt", buffers, loaded.key)
    values = {name: torch.full((CHANNELS,), 3.0) for name in ("1.running_mean", "3.running_mean")}
    assert_same_but(torch.load(tmp_path / "old.pt"), torch.load(tmp_path / "new.pt"), values)


# ---- refusals: one line, and nothing is written


def refusal(folder: Path, name: str, values: dict[str, Tensor], key: str | None = None) -> str:
    """What is said of the file; nothing is written and it is as before."""
    source = folder / name
    before, names = source.read_bytes(), sorted(folder.iterdir())
    told = None
    try:
        check_rewritable(source, values, key)
    except CheckpointError as error:
        told = str(error)
    with pytest.raises(CheckpointError) as caught:
        rewrite(source, folder / "refused.pt", values, key)
    assert sorted(folder.iterdir()) == names
    assert source.read_bytes() == before
    text = str(caught.value)
    # it is known before new values are measured, unless it is about these values
    assert told == (None if re.search("new values|cannot hold|get different", text) else text)
    assert text.startswith(f"{source}: ")
    assert "\n" not in text
    return text.removeprefix(f"{source}: ")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"1.running_men": torch.zeros(5)}, "no 1.running_men; did you mean 1.running_mean?"),
        ({"layer": torch.zeros(5)}, "no layer"),
        ({"0.weight": torch.zeros(5)}, "0.weight is no running statistic of a BatchNorm layer"),
        ({"1.weight": torch.zeros(5)}, "1.weight is no running statistic of a BatchNorm layer"),
        (
            {"1.running_mean": torch.zeros(6)},
            "1.running_mean has shape (5,) in the file, and (6,) in the new values",
        ),
        (
            {"1.num_batches_tracked": torch.zeros(2, dtype=torch.int64)},
            "1.num_batches_tracked has shape () in the file, and (2,) in the new values",
        ),
        (
            {"1.running_var": torch.tensor([1, 1, 70_000.0, 1, 1])},
            "1.running_var is float16 in the file, which cannot hold 70000",
        ),
        (
            {"1.num_batches_tracked": torch.tensor(2.5)},
            "1.num_batches_tracked is int64 in the file, which cannot hold 2.5",
        ),
        (
            {"1.running_var": torch.ones(5, dtype=torch.complex64)},
            "1.running_var is float16 in the file, and complex in the new values",
        ),
    ],
)
def test_values_that_do_not_fit_are_refused(tmp_path: Path, values: dict[str, Tensor], expected: str) -> None:
    torch.save(network().half().state_dict(), tmp_path / "old.pt")
    good = {"2.0.running_mean": torch.zeros(5)}
    assert refusal(tmp_path, "old.pt", good | values) == expected


def test_infinities_and_nans_that_are_given_are_kept(tmp_path: Path) -> None:
    torch.save(network().half().state_dict(), tmp_path / "old.pt")
    given = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 65_504.0])
    rewrite(tmp_path / "old.pt", tmp_path / "new.pt", {"1.running_mean": given})
    assert bitwise_equal(torch.load(tmp_path / "new.pt")["1.running_mean"], given.half())


def saved_sharing(how: str) -> object:
    state = network().state_dict()
    mean = "1.running_mean"
    match how:
        case "another view elsewhere":
            return {"model": state, "average": {name: tensor.detach() for name, tensor in state.items()}}
        case "one tensor in two dicts":
            return {"model": state, "average": dict(state)}
        case "one dict in two places":
            return {"model": state, "average": [state]}
        case "one dict in a dict in two places":
            outer = {"inner": state}
            return {"model": outer, "again": outer}
        case "the storage itself":
            raw = torch.storage.TypedStorage(
                wrap_storage=state[mean].untyped_storage(), dtype=torch.float32, _internal=True
            )
            return {"model": state, "raw": raw}
        case "a longer tensor":
            flat = torch.zeros(20)
            return {"model": {**state, mean: flat[3:8]}, "flat": flat}
        case "its last number":
            flat = torch.zeros(20)
            return {"model": {**state, mean: flat[3:8]}, "flat": flat[7:]}
        case "a tensor with gaps":
            flat = torch.zeros(20)
            return {"model": {**state, mean: flat[13:18]}, "some": flat[::4]}
        case "a key of a dict":
            return {"model": state, "more": {state[mean].detach(): 1}}
        case "an attribute of a parameter":
            parameter = nn.Parameter(torch.zeros(2))
            parameter.mean = state[mean].detach()
            return {"model": {**state, "x": parameter}}
        case "a sparse tensor":
            places = torch.arange(5)[None]
            sparse = torch.sparse_coo_tensor(places, state[mean], (5,), check_invariants=True)
            return {"model": state, "sparse": sparse}
    raise AssertionError(how)


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize(
    "how",
    [
        "another view elsewhere",
        "one tensor in two dicts",
        "one dict in two places",
        "one dict in a dict in two places",
        "the storage itself",
        "a longer tensor",
        "its last number",
        "a tensor with gaps",
        "a key of a dict",
        "an attribute of a parameter",
        "a sparse tensor",
    ],
)
def test_a_buffer_that_shares_its_memory_is_refused(tmp_path: Path, how: str, as_zip: bool) -> None:
    torch.save(saved_sharing(how), tmp_path / "old.pt", _use_new_zipfile_serialization=as_zip)
    key = "model.inner" if "in a dict in" in how else "model"
    text = refusal(tmp_path, "old.pt", {"1.running_mean": torch.ones(5)}, key)
    assert text.startswith("1.running_mean shares its memory in the file with ")
    # its neighbours in the file are free to change
    if "two" not in how and "elsewhere" not in how:
        rewrite(tmp_path / "old.pt", tmp_path / "new.pt", {"1.running_var": torch.ones(5)}, key)


def test_a_neighbour_of_the_buffer_in_one_storage_is_no_hindrance(tmp_path: Path) -> None:
    flat = torch.arange(20.0)
    state = network().state_dict() | {"1.running_mean": flat[3:8], "before": flat[:3], "after": flat[8:]}
    torch.save(state, tmp_path / "old.pt")
    values = {"1.running_mean": torch.ones(5)}
    rewrite(tmp_path / "old.pt", tmp_path / "new.pt", values)
    assert_same_but(torch.load(tmp_path / "old.pt"), torch.load(tmp_path / "new.pt"), values)


def test_a_buffer_whose_numbers_are_one_number_is_refused(tmp_path: Path) -> None:
    state = network().state_dict() | {"1.running_var": torch.ones(1).expand(5)}
    torch.save(state, tmp_path / "old.pt")
    text = refusal(tmp_path, "old.pt", {"1.running_var": torch.rand(5)})
    assert text.startswith("the numbers of 1.running_var share their memory with each other")


def test_the_source_itself_is_never_the_target(tmp_path: Path) -> None:
    save_state_dict(tmp_path / "old.pt")
    before = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "link.pt").symlink_to("old.pt")
    os.link(tmp_path / "old.pt", tmp_path / "hard.pt")
    for name in ("old.pt", "link.pt", "hard.pt"):
        with pytest.raises(CheckpointError, match="is never changed itself; give another name"):
            rewrite(tmp_path / "old.pt", tmp_path / name, new_buffers())
    assert (tmp_path / "old.pt").read_bytes() == before


def test_a_target_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    save_state_dict(tmp_path / "old.pt")
    with pytest.raises(FileNotFoundError):
        rewrite(tmp_path / "old.pt", tmp_path / "no" / "new.pt", new_buffers())
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]


def test_files_of_other_kinds_are_refused(tmp_path: Path, finished_run: Path) -> None:
    (tmp_path / "own.pt").write_bytes((finished_run / "last.pt").read_bytes())
    assert "digests would not fit" in refusal(tmp_path, "own.pt", {})
    state = network().state_dict()
    safetensors.torch.save_file(state, tmp_path / "part.safetensors")
    index = {"weight_map": dict.fromkeys(state, "part.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "an index of several files" in refusal(tmp_path, "model.safetensors.index.json", {})
    (tmp_path / "text.pt").write_text("hello")
    assert "not a checkpoint" in refusal(tmp_path, "text.pt", {})
    torch.save({"weight": torch.zeros(3)}, tmp_path / "none.pt")
    assert "no BatchNorm layer" in refusal(tmp_path, "none.pt", {})
    save_state_dict(tmp_path / "packed.pt")
    repack(tmp_path / "packed.pt", lambda _: True)
    text = refusal(tmp_path, "packed.pt", new_buffers())
    assert text.startswith("1.running_mean is compressed, which torch.save does not do;")


def test_a_file_of_a_big_endian_machine_is_refused(tmp_path: Path) -> None:
    save_state_dict(tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "old.pt") as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        for name, data in entries:
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    assert "big-endian" in refusal(tmp_path, "big.pt", new_buffers())


def test_damage_in_a_changed_storage_does_not_get_a_checksum_that_fits(tmp_path: Path) -> None:
    """The weights share their storage with the buffers, so its checksum is computed anew."""
    save_views(tmp_path / "old.pt")
    data = bytearray((tmp_path / "old.pt").read_bytes())
    weight = torch.load(tmp_path / "old.pt")["0.weight"].numpy().tobytes()
    data[data.index(weight)] ^= 1
    (tmp_path / "old.pt").write_bytes(data)
    assert "the checksum of its entry" in refusal(tmp_path, "old.pt", new_buffers())


def test_a_storage_of_many_pieces_gets_a_checksum_that_fits(tmp_path: Path) -> None:
    """Buffers that lie across the boundaries of the pieces in which the checksum is computed."""
    flat = torch.rand(3 * 2**18)  # 3 MiB
    state = network().state_dict() | {
        "1.running_mean": flat[2**18 - 2 : 2**18 + 3],
        "1.running_var": flat[2**19 - 5 : 2**19],
        "rest": flat[2**19 :],
    }
    torch.save(state, tmp_path / "old.pt")
    values = new_buffers()
    rewrite(tmp_path / "old.pt", tmp_path / "new.pt", values)
    assert_same_but(torch.load(tmp_path / "old.pt"), torch.load(tmp_path / "new.pt"), values)
    with zipfile.ZipFile(tmp_path / "new.pt") as archive:
        assert archive.testzip() is None


def test_entries_that_share_bytes_are_refused(tmp_path: Path) -> None:
    save_state_dict(tmp_path / "old.pt")
    data = bytearray((tmp_path / "old.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "old.pt") as archive:
        infos = archive.infolist()
        place = archive.start_dir
    mean = next(info for info in infos if info.filename.endswith("data/3"))
    for info in infos:  # the entry data/8 is said to lie where data/3 does
        length = 46 + sum(struct.unpack_from("<HHH", data, place + 28))
        if info.filename.endswith("data/8"):
            struct.pack_into("<L", data, place + 42, mean.header_offset)
        place += length
    (tmp_path / "old.pt").write_bytes(data)
    assert "entries that share bytes" in refusal(tmp_path, "old.pt", new_buffers())


class Call:
    """Pickles as a call of any function."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def test_nothing_in_the_file_is_executed_and_it_is_copied_as_it_is(tmp_path: Path) -> None:
    torch.save({"model": network().state_dict(), "x": Call(tmp_path / "canary")}, tmp_path / "old.pt")
    rewrite(tmp_path / "old.pt", tmp_path / "new.pt", new_buffers())
    assert not (tmp_path / "canary").exists()
    torch.load(tmp_path / "new.pt", weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"h\0Q0" * 101,  # storages that are named and dropped
        # and tensors that are made of one
        b"h\0Qq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02" + b"h\x02(h\x01K\0K\1\x85K\1\x85tR0" * 101,
    ],
)
def test_a_pickle_does_not_fill_the_memory_with_what_it_drops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: bytes
) -> None:
    monkeypatch.setattr(torch_pickle, "MAX_NOTED", 100)
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4tq\x000"
    with zipfile.ZipFile(tmp_path / "old.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\2" + storage + program + b"}.")
        archive.writestr("a/data/0", bytes(16))
    assert refusal(tmp_path, "old.pt", {}) == "a pickle of more than 100 tensors"


def test_damaged_files_are_refused_or_rewritten_but_never_crash(tmp_path: Path) -> None:
    randomness = random.Random(0)
    originals = []
    for save in (save_with_average, save_legacy, save_module, save_repacked):
        save(tmp_path / "old.pt")
        originals.append((tmp_path / "old.pt").read_bytes())
    originals.append(safetensors.torch.save(network().state_dict()))
    outcomes = {True: 0, False: 0}
    for trial in range(400):
        data = bytearray(originals[trial % len(originals)])
        for _ in range(randomness.randint(1, 3)):
            place = randomness.randrange(len(data))
            if randomness.random() < 0.2:
                del data[place:]
                data += b"\0"
            else:
                data[place : place + 2] = randomness.randbytes(2)
        (tmp_path / "damaged").write_bytes(data)
        try:
            rewrite(tmp_path / "damaged", tmp_path / "new", new_buffers())
            outcomes[True] += 1
        except BncliError as error:
            assert "\n" not in str(error)
            assert not (tmp_path / "new").exists()
            outcomes[False] += 1
        (tmp_path / "new").unlink(missing_ok=True)
    assert min(outcomes.values()) > 30


def test_a_file_in_memory_of_fsspec_is_copied_too(tmp_path: Path) -> None:
    import fsspec

    buffer = io.BytesIO()
    torch.save(network().state_dict(), buffer)
    with fsspec.open("memory://old.pt", "wb") as file:
        file.write(buffer.getvalue())
    values = new_buffers()
    rewrite("memory://old.pt", tmp_path / "new.pt", values)
    buffer.seek(0)
    assert_same_but(torch.load(buffer), torch.load(tmp_path / "new.pt"), values)
