"""Exported files are recognised by what is in them, and tell what they are."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bncli.errors import CheckpointError
from bncli.export import EngineNetwork, ExportRecord, exported_file, open_engine
from bncli.export.engines import in_one_line
from bncli.export.exported_file import exported_record
from tests.export.hand_made import a_record, logits_of, write_onnx

pytest.importorskip("onnx")


def test_a_record_is_read_as_it_was_written() -> None:
    record = a_record(kept=(("bn", "why"),), data_digest="00")
    assert ExportRecord.from_json(record.to_json(), "x") == record
    assert record.sentence == "1 of 2 BatchNorm layers were folded away"
    assert replace(record, folded=()).sentence == "the only BatchNorm layer is kept"
    assert record.image_size == 4
    assert replace(record, image_shape=(3, 4, 5)).image_size == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pixels": "int8"}, "pixels"),
        ({"image_shape": [3, -4, 4]}, "image_shape"),
        ({"image_shape": [3, 4, True]}, "image_shape"),
        ({"class_names": [1]}, "class_names"),
        ({"folded": [["a"]]}, "BatchNorm"),
        ({"source": None}, "source"),
        ({"version": 2}, "newer bncli"),
        ({"version": None}, "newer bncli"),
    ],
)
def test_a_damaged_record_is_refused_in_words(change: dict[str, object], reason: str) -> None:
    values = json.loads(a_record().to_json()) | change
    with pytest.raises(CheckpointError, match=rf"^net\.onnx: .*{reason}"):
        ExportRecord.from_json(json.dumps(values), "net.onnx")
    with pytest.raises(CheckpointError, match="damaged"):
        ExportRecord.from_json("[1]", "net.onnx")


def test_onnx_openvino_and_torch_export_are_told_by_their_content(tmp_path: Path) -> None:
    text = a_record().to_json()
    onnx = write_onnx(tmp_path / "a", text)
    xml = tmp_path / "b"
    quoted = text.replace("&", "&amp;").replace('"', "&quot;")
    xml.write_text(f'<?xml version="1.0"?><net><rt_info><bncli value="{quoted}"/></rt_info></net>')
    pt2 = tmp_path / "c"
    with zipfile.ZipFile(pt2, "w") as archive:
        archive.writestr("net/archive_format", "pt2")
        archive.writestr("net/extra/bncli", text)
    for path, kind in ((onnx, "onnx"), (xml, "openvino"), (pt2, "pt2")):
        found = exported_file(path)
        assert found is not None
        assert (found.kind, found.record) == (kind, a_record())


def test_other_programs_files_of_these_formats_are_refused_where_they_are_used(tmp_path: Path) -> None:
    found = exported_file(write_onnx(tmp_path / "a.onnx", None))
    assert found is not None
    with pytest.raises(CheckpointError, match=r"an ONNX model that `bncli export` did not write"):
        found.known  # noqa: B018


def test_all_else_is_no_exported_file(tmp_path: Path, finished_run: Path) -> None:
    path = tmp_path / "x"
    for content in (
        b"",
        b"\x08",
        b"\x08\xff\xff",
        b"<html/>",
        b"<?xml version='1.0'?><a>",
        b"PK\x03\x04",
        b"{}",
    ):
        path.write_bytes(content)
        assert exported_file(path) is None
    assert exported_file(finished_run / "last.pt") is None
    assert exported_file(tmp_path) is None
    path.write_text('<?xml version="1.0"?><!DOCTYPE net [<!ENTITY a "b">]><net><x>&a;</x></net>')
    assert exported_file(path) is None


def test_safetensors_carry_the_record_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x", {"bncli": a_record().to_json()})
    assert exported_record(tmp_path / "x") == a_record()
    save_file({"a": torch.zeros(1)}, tmp_path / "y")
    assert exported_record(tmp_path / "y") is None
    assert exported_file(tmp_path / "x") is None  # no engine computes it


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_an_engine_is_a_module_that_takes_either_kind_of_pixels(tmp_path: Path, pixels: str) -> None:
    pytest.importorskip("onnxruntime")
    exported = exported_file(write_onnx(tmp_path / "a.onnx", a_record().to_json()))
    assert exported is not None
    network = EngineNetwork.of(exported, open_engine(exported, 1))
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    given = images if pixels == "uint8" else images / 255
    expected = torch.from_numpy(logits_of(images.numpy())).float()
    torch.testing.assert_close(network(given), expected)
    assert not network.train().training
    assert "ONNX Runtime" in repr(network)


def test_a_damaged_model_is_refused_by_its_engine_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = write_onnx(tmp_path / "a.onnx", a_record().to_json())
    path.write_bytes(path.read_bytes().replace(b"MatMul", b"MatMux"))
    exported = exported_file(path)
    assert exported is not None
    with pytest.raises(CheckpointError, match=r"a\.onnx: ONNX Runtime cannot open it: [^\n]*MatMux[^\n]*$"):
        open_engine(exported)


def test_predicting_with_onnx_runtime_imports_no_torch(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from PIL import Image

    pixels = np.random.default_rng(1).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    path = write_onnx(tmp_path / "a.onnx", a_record().to_json())
    code = (
        "import sys; from bncli.cli.app import main; main(sys.argv[1:]);"
        " print([name for name in ('torch', 'rich', 'yaml') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", path.name, "p.png", "--top", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.strip() == "[]"
    logits = logits_of(pixels.transpose(2, 0, 1)[None])[0]
    probabilities = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-probabilities)
    names = [f"{('cat', 'dog', 'ship')[index]} {probabilities[index]:.1%}" for index in order]
    assert done.stdout == f"p.png: {', '.join(names)}\n"


def test_what_an_engine_says_is_short_and_without_places_in_its_code() -> None:
    said = (
        "Exception from src/core.cpp:117: Check '!list().empty()' failed at src/node.cpp:345:\n no kernel: a"
    )
    assert in_one_line(RuntimeError(said)) == "no kernel: a"
    assert in_one_line(RuntimeError("x" * 400)) == "x" * 297 + "..."
    assert in_one_line(ValueError()) == "ValueError"
