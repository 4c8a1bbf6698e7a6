"""Files that bncli does not read: each is named, and what the refusal advises works."""

import gzip
import io
import lzma
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn

from bncli.batchnorm import read_running_stats
from bncli.checkpoints import open_checkpoint
from bncli.errors import CheckpointError, NoBatchNormError, OtherFormatError
from tests.conftest import Bncli


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()


def refusal(source: Path | str, error: type[CheckpointError] = OtherFormatError) -> str:
    with pytest.raises(error) as caught, open_checkpoint(source):
        pass
    text = str(caught.value)
    assert text.startswith(f"{source}: ")
    assert "\n" not in text
    return text.removeprefix(f"{source}: ")


# ---- files of packages that are at hand


def save_distributed(directory: Path, content: dict[str, object]) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        dcp.save(content, checkpoint_id=directory)


def test_a_part_of_a_distributed_checkpoint_is_named_and_its_advice_works(tmp_path: Path) -> None:
    model = network()
    save_distributed(tmp_path / "dcp", {"model": model.state_dict(), "epoch": 3})
    (shard,) = (tmp_path / "dcp").glob("*.distcp")
    assert refusal(tmp_path / "dcp" / ".metadata").startswith(
        "the metadata of torch.distributed.checkpoint; "
    )
    assert refusal(shard).startswith("by its name a shard of torch.distributed.checkpoint; ")
    for path in (tmp_path / "dcp" / ".metadata", shard):
        assert "give its directory" in refusal(path)
    with open_checkpoint(tmp_path / "dcp") as checkpoint:
        (layer,) = checkpoint.layers()
    assert torch.equal(layer.running_var, model[1].running_var)
    (tmp_path / "dcp" / ".metadata").unlink()
    assert refusal(tmp_path / "dcp").startswith("shards of torch.distributed.checkpoint; .metadata, which")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["scripted", "traced", "unfolded", "optimized"])
def test_a_frozen_torchscript_is_named(tmp_path: Path, how: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).eval() if how == "unfolded" else network()
    script = torch.jit.trace(model, torch.zeros(1, 3, 8, 8)) if how == "traced" else torch.jit.script(model)
    frozen = torch.jit.optimize_for_inference(script) if how == "optimized" else torch.jit.freeze(script)
    frozen.save(tmp_path / "frozen.pt")
    text = refusal(tmp_path / "frozen.pt", NoBatchNormError)
    assert "torch.jit.freeze" in text
    assert "0 tensors" not in text
    script.save(tmp_path / "script.pt")  # the same, not frozen
    with open_checkpoint(tmp_path / "script.pt") as checkpoint:
        assert len(checkpoint.layer_names) == 1


def test_arrays_of_numpy_are_named_and_the_advice_for_all_arrays_works(tmp_path: Path) -> None:
    mean, var = np.arange(4, dtype="f4"), np.full(4, 2, dtype="f4")
    np.savez(tmp_path / "a.npz", mean=mean, var=var)
    np.save(tmp_path / "a.npy", mean)
    assert refusal(tmp_path / "a.npz").startswith("NumPy arrays (.npz); ")
    assert refusal(tmp_path / "a.npy").startswith("a NumPy array (.npy); ")
    assert "safetensors.numpy.save_file, named LAYER.running_mean and LAYER.running_var" in refusal(
        tmp_path / "a.npz"
    )
    arrays = {"bn.running_mean": mean, "bn.running_var": var}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        (layer,) = checkpoint.layers()
    assert (layer.running_mean.tolist(), layer.running_var.tolist()) == ([0, 1, 2, 3], [2] * 4)


def test_a_package_of_torch_is_named(tmp_path: Path) -> None:
    from torch.package import PackageExporter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own, about typed storages
        with PackageExporter(tmp_path / "package.pt") as exporter:
            exporter.extern("**")
            exporter.save_pickle("model", "model.pkl", network())
    assert refusal(tmp_path / "package.pt").startswith("a package of torch.package; ")


def test_pickles_that_torch_save_did_not_write_are_named(tmp_path: Path) -> None:
    import pickle

    paddle = {"conv.weight": np.zeros(3, "f4"), "StructuredToParameterName@@": {"conv.weight": "w_0"}}
    for content, expected in (
        (network().state_dict(), "a pickle of PyTorch objects, not made by torch.save; "),
        ({"model": {"bn.running_mean": np.zeros(3)}}, "a pickle with NumPy arrays, not made by torch.save; "),
        (paddle, "a parameter file of Paddle (.pdparams); "),
    ):
        for protocol in (2, 4):
            (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
            assert refusal(tmp_path / "a.pkl").startswith(expected)


def test_an_unpacked_file_of_torch_save_is_named_and_its_advice_works(tmp_path: Path) -> None:
    model = network()
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        archive.extractall(tmp_path / "unpacked")
    assert refusal(tmp_path / "unpacked" / "whole").startswith("an unpacked file of torch.save; ")
    with zipfile.ZipFile(tmp_path / "again.pt", "w") as archive:  # as zip -0 -r does
        for path in (tmp_path / "unpacked").rglob("*"):
            archive.write(path, path.relative_to(tmp_path / "unpacked"))
    with open_checkpoint(tmp_path / "again.pt") as checkpoint:
        found = checkpoint.layers()
    assert [layer.name for layer in found] == [layer.name for layer in read_running_stats(model)]


# ---- files of other libraries, as far as their first bytes and structure go, from the published descriptions


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def message(*fields: tuple[int, bytes | int]) -> bytes:
    """A message of a protocol buffer."""
    parts = []
    for number, value in fields:
        is_bytes = isinstance(value, bytes)
        content = varint(len(value)) + value if isinstance(value, bytes) else varint(value)
        parts.append(varint(number << 3 | 2 * is_bytes) + content)
    return b"".join(parts)


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"{}")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"))
    return file.getvalue()


node = message((1, b"input"), (2, b"Placeholder"))
table = b"\0\0\x04\x08\x01\x1a\x00" + bytes(60) + bytes.fromhex("57fb808b247547db")
flax = b"\x81\xa5batch\x81\xa4mean\xc7\x1d\x01\x93\x91\x04\xa7float32\xc4\x10" + bytes(16)
OF_BYTES = {
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(500), "an HDF5 file that is written in a way that bncli does not"),
    "HDF5 behind a user block": (
        bytes(512) + b"\x89HDF\r\n\x1a\n" + bytes(500),
        "an HDF5 file, but not one that Keras wrote; ",
    ),
    "Keras .keras": (zipped("config.json", "model.weights.h5"), "a damaged or truncated HDF5 file: "),
    "TensorFlow Lite": (b"\x20\0\0\0TFL3" + bytes(60), "a TensorFlow Lite model (.tflite); "),
    "TensorFlow graph": (message((1, node), (1, node)), "a graph of TensorFlow (.pb); "),
    "SavedModel": (message((1, 1), (2, message((1, b"")))), "a saved_model.pb of TensorFlow"),
    "TensorFlow index": (table, "a damaged"),
    "LevelDB": (b"\0\3" + table[2:], "a table of LevelDB; not a checkpoint"),
    "TensorFlow list": (b'model_checkpoint_path: "ck-1"\n', "the list of a directory of TensorFlow"),
    "Core ML": (message((1, 4), (2, b"\x0a\x00"), (500, bytes(300))), "a Core ML model (.mlmodel); "),
    "Core ML, packed": (
        zipped("a.mlpackage/Manifest.json", "a.mlpackage/Data/com.apple.CoreML/model.mlmodel"),
        "a packed Core ML package",
    ),
    "Caffe": (message((1, b"net"), (100, bytes(40))), "a network of Caffe (.caffemodel); "),
    "Paddle program": (message((1, message((1, 0), (2, 2**64 - 1)))), "a program of Paddle (.pdmodel)"),
    "Flax": (flax, "no BatchNorm layer with running statistics in it, but 1 tensor, batch.mean"),
    "Flax, one letter": (b"\x81\xa1a" + flax[7:], "no BatchNorm layer with running statistics in it"),
    "other MessagePack": (b"\x81\xa1a\x01", "a file of an unknown kind, or a damaged one; bncli reads "),
    "MXNet symbol": (b'{"nodes": [], "arg_nodes": [], "heads": []}', "a network of MXNet (-symbol.json)"),
    "Paddle JSON": (b'{"base_code": {"magic": "pir"}}', "a program of Paddle (.json)"),
    "TensorFlow.js": (b'{"modelTopology": {}, "weightsManifest": []}', "a model of TensorFlow.js; "),
    "Hugging Face": (b'{"model_type": "resnet"}', "the configuration of a Hugging Face model; "),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(40), "a GGUF file (llama.cpp); "),
    "OpenVINO": (b'<?xml version="1.0"?>\n<net name="m" version="11">', "a network of OpenVINO (.xml)"),
    "ncnn": (b"7767517\n2 2\nInput data 0 1 data\n", "a network of ncnn (.param)"),
    "ncnn binary": (struct.pack("<iii", 7767517, 2, 2), "a network of ncnn (.param.bin); "),
    "Darknet": (struct.pack("<iiiQ", 0, 2, 5, 32013312) + bytes(64), "a weight file of Darknet (.weights); "),
    "ExecuTorch": (b"\x38\0\0\0ET12" + bytes(40), "an ExecuTorch program (.pte); "),
    "MATLAB": (b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\x01IM", "a MATLAB file (.mat)"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS,"),
    "HTML": (b"\xef\xbb\xbf\r\n<!DOCTYPE html>\n<html><head>", "a web page (HTML), not the file itself; "),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML, such as a server's"),
    "tar": (tarred(), "a tar archive; unpack it"),
    "gzip": (gzip.compress(b"x" * 100), "a file compressed by gzip; unpack it"),
    "xz": (lzma.compress(b"x" * 100), "a file compressed by xz; unpack it"),
    "zip of a checkpoint": (zipped("run/last.pt"), "a zip archive that holds run/last.pt; unpack it"),
    "TorchServe": (zipped("MAR-INF/MANIFEST.json", "model.pt"), "a model archive of TorchServe (.mar); "),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(30), "a PNG image; not a checkpoint"),
    "GIF": (b"GIF89a....", "a GIF image; not a checkpoint"),  # which is a pickle of a number, too
    "video": (b"\0\0\0\x18ftypmp42", "a video or image (MP4, HEIF, AVIF); "),
    "OCDBT": (b"\x0c\xdb:*" + bytes(40), "the manifest of an OCDBT database (Orbax, TensorStore); give"),
    "part of OCDBT": (b"\x0c\xdb\x20\xde" + bytes(40), "a part of an OCDBT database (Orbax, TensorStore); "),
    "wheel": (zipped("a-1.dist-info/METADATA", "a/a.h5"), "a Python package (.whl); unpack it"),
    "other zip": (zipped("a.txt"), "not a checkpoint, but a zip archive with a.txt; bncli reads "),
    "text": (b"epochs: 30\nwidths: [8, 16]\n", "plain text; not a checkpoint"),
    "JSON list": (b"[1, 2]", "JSON; not a checkpoint"),
    "JSON lines": (b'{"epoch": 1}\n{"epoch": 2}\n', "not a checkpoint: text that begins like JSON"),
    "other JSON": (b'{"epoch": 1}', "not a checkpoint: JSON, but no index of shards"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_BYTES)
@pytest.mark.parametrize("place", ["file", "URL"])
def test_a_format_is_named_by_its_bytes(tmp_path: Path, name: str, place: str) -> None:
    content, expected = OF_BYTES[name]
    source = f"memory://formats/{name}.pt" if place == "URL" else str(tmp_path / "model.pt")
    with fsspec.open(source, "wb") as file:
        file.write(content)
    assert refusal(source, CheckpointError).startswith(expected)


OF_NAMES = {
    "a.engine": "by its name an engine of TensorRT; ",
    "a.plan": "by its name an engine of TensorRT; ",
    "ck-1.data-00000-of-00001": "by its name the numbers of a TensorFlow checkpoint; ",
    "model.ckpt.meta": "by its name the graph of a TensorFlow checkpoint; give the .index file",
    "a.pdparams": "by its name a parameter file of Paddle; ",
    "a.pt": "a file of an unknown kind, or a damaged one; bncli reads checkpoints of PyTorch, ",
}


@pytest.mark.parametrize(
    "content", [bytes(range(1, 200)) * 3, b"\x10\0\0\0\0\0\0\0{\x07nonsense!!!!!!!!", b"{\0\1\2"]
)
@pytest.mark.parametrize("name", OF_NAMES)
def test_where_bytes_do_not_tell_the_name_does_and_the_answer_says_so(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    of_no_name = {1: OF_NAMES["a.pt"], 16: "a damaged file: ", 123: "not a checkpoint: text that begins like"}
    expected = OF_NAMES[name] if name != "a.pt" else of_no_name[content[0]]
    assert refusal(tmp_path / name, CheckpointError).startswith(expected)


OF_DIRECTORIES: dict[str, tuple[tuple[str, ...], str]] = {
    "SavedModel": (("saved_model.pb", "assets/words"), "a SavedModel of TensorFlow without variables; "),
    "TensorFlow": (
        ("checkpoint", "ck-1.index"),
        "a directory of TensorFlow checkpoints; give the .index file",
    ),
    # without _METADATA, as before 2023, the paths of arrays are not known
    "Orbax": (("manifest.ocdbt", "d/0"), "a checkpoint of Orbax (JAX, Flax); "),
    "Orbax manager": (("0/_CHECKPOINT_METADATA",), "a checkpoint of Orbax (JAX, Flax); "),
    "Core ML": (("Manifest.json", "Data/com.apple.CoreML/model.mlmodel"), "a Core ML package (.mlpackage); "),
    "DeepSpeed": (("zero_to_fp32.py", "latest"), "a checkpoint of DeepSpeed; "),
    "Hugging Face": (
        ("config.json", "tf_model.h5", "model.safetensors"),
        "a directory, not a checkpoint; did you mean {}/model.safetensors?",
    ),
    "a run": (("config.yaml", "last.pt"), "a directory, not a checkpoint; did you mean {}/last.pt?"),
    "empty": ((), "a directory, not a checkpoint"),
}


@pytest.mark.parametrize("name", OF_DIRECTORIES)
@pytest.mark.parametrize("place", ["directory", "URL"])
def test_a_directory_is_named_by_what_it_holds(tmp_path: Path, name: str, place: str) -> None:
    names, expected = OF_DIRECTORIES[name]
    for inside in names:
        path = tmp_path / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    source = f"file://{tmp_path}" if place == "URL" else str(tmp_path)
    if (name, place) == ("Orbax manager", "URL"):  # at a URL one level is looked at
        expected = "a directory, not a checkpoint"
    assert refusal(source).startswith(expected.format(source))


def test_a_directory_that_cannot_be_listed_is_still_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert refusal(tmp_path) == "a directory, not a checkpoint"


# ---- what is said where there are tensors, and no BatchNorm


def test_what_stands_in_place_of_batch_norm_is_counted_in_grammar(tmp_path: Path) -> None:
    none = "no BatchNorm layer with running statistics in it"
    for content, expected in (
        ({"weight": torch.zeros(2)}, f"{none}, but 1 tensor, weight"),
        ({"a": {"w": torch.zeros(2), "b": torch.zeros(2)}}, f"{none}, but 2 tensors under a, such as w, b"),
        (torch.zeros(3, 2), f"{none}, but 1 tensor without a name, of shape (3, 2)"),
        ([torch.zeros(3), torch.ones(2)], f"{none}, but 2 tensors without a name, the first of shape (3,)"),
        ({"w": np.zeros(3)}, f"{none}, but arrays of NumPy; save them as tensors (torch.from_numpy)"),
        ({"epoch": 3}, f"{none}, and no tensor at all"),
        (nn.ReLU(), f"{none}, and no tensor at all"),
    ):
        torch.save(content, tmp_path / "a.pt")
        assert refusal(tmp_path / "a.pt", NoBatchNormError).startswith(expected)
    torch.save({"one": nn.BatchNorm2d(2).state_dict()}, tmp_path / "a.pt")
    expected = r"there are one \(1 BatchNorm layer, 5 tensors\)"
    with pytest.raises(CheckpointError, match=expected), open_checkpoint(tmp_path / "a.pt", "two"):
        pass


def test_an_ending_that_does_not_fit_the_content_is_told(bncli: Bncli, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "net.onnx")
    outcome = bncli("eval", tmp_path / "net.onnx")
    assert outcome.code == 2
    assert "(made by `bncli train`); its ending .onnx does not fit a torch file; name" in outcome.err
    torch.save({"weight": torch.zeros(2)}, tmp_path / "net.pt")
    assert "does not fit" not in bncli("eval", tmp_path / "net.pt").err


def test_doctor_gives_no_advice_for_damage_where_the_format_is_another(bncli: Bncli, tmp_path: Path) -> None:
    content, _ = OF_BYTES["HDF5"]
    (tmp_path / "model.h5").write_bytes(content)
    outcome = bncli("doctor", tmp_path / "model.h5")
    text = " ".join(outcome.out.split())
    assert outcome.code == 1
    assert "an HDF5 file that is written in a way" in text
    assert "restore it from a copy" not in text
    with pytest.warns(DeprecationWarning):
        torch.jit.script(network()).save(tmp_path / "script.pt")  # whose code is compressed, as torch does it
    outcome = bncli("doctor", tmp_path / "script.pt")
    assert (outcome.code, "foreign (torchscript)" in outcome.out) == (0, True)
    assert "a torchscript file, but no bncli checkpoint" in bncli("eval", tmp_path / "script.pt").err
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "restore it from a copy" in " ".join(bncli("doctor", tmp_path / "cut.pt").out.split())


SUFFIXES = ["onnx", "engine", "distcp", "h5", "data-00000-of-00001", "pdparams", "npz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("save", ["torch zip", "torch legacy", "safetensors"])
def test_no_name_keeps_a_readable_file_from_being_read(tmp_path: Path, suffix: str, save: str) -> None:
    path = tmp_path / f"model.{suffix}"
    writers: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "torch zip": lambda state: torch.save(state, path),
        "torch legacy": lambda state: torch.save(state, path, _use_new_zipfile_serialization=False),
        "safetensors": lambda state: safetensors.torch.save_file(state, path),
    }
    writers[save](network().state_dict())
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.layer_names) == 1


def test_no_content_of_a_text_is_shown(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SECRET=tiger\n")
    assert "tiger" not in refusal(tmp_path / ".env")


@pytest.mark.parametrize(("beside", "expected"), [("net.xml", "OpenVINO"), ("net.param", "ncnn")])
def test_numbers_are_named_by_the_description_beside_them(tmp_path: Path, beside: str, expected: str) -> None:
    (tmp_path / "net.bin").write_bytes(bytes(range(1, 200)) * 3)
    assert "of an unknown kind" in refusal(tmp_path / "net.bin", CheckpointError)
    (tmp_path / beside).touch()
    assert refusal(tmp_path / "net.bin").startswith(f"by the {beside[3:]} file beside it the numbers of")
    assert expected in refusal(tmp_path / "net.bin")
