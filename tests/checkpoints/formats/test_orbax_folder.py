"""Directories of Orbax: against what Flax says of them (tests/frameworks/make_flax.py), and broken ones."""

import importlib.util
import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.folder import Folder
from bncli.checkpoints.formats import zstandard_frame
from bncli.checkpoints.formats.crc32c import crc32c
from bncli.checkpoints.formats.ocdbt import read_ocdbt
from bncli.checkpoints.formats.zarr_array import zarr_tensor
from bncli.errors import CheckpointError, OtherFormatError
from tests.checkpoints.formats.damage import is_refused, mutations, truncated
from tests.checkpoints.formats.framework_answers import FILES, answers, check_layers, opened

FOLDER = FILES / "orbax"
ANSWERS = answers("orbax")


@pytest.mark.parametrize("name", ANSWERS)
def test_layers_are_those_of_flax(name: str) -> None:
    kind, layers, _ = opened(FOLDER / name)
    assert kind == "orbax"
    check_layers(layers, ANSWERS[name])


def test_of_several_steps_the_last_is_read_and_any_can_be_given() -> None:
    _, (ten,), notes = opened(FOLDER / "manager")  # where 10 stands before 2
    assert notes == ("there are 2 steps; this is the last, 10 (others: 2)",)
    for place in ("manager/2", "manager/2/default"):
        _, (two,), notes = opened(FOLDER / place)
        assert notes == ()
        assert two.running_mean is not None and ten.running_mean is not None
        assert (two.running_mean * 5 - ten.running_mean).abs().max() < 1e-6


def test_an_unfinished_step_is_left_out(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "manager", tmp_path / "m")
    shutil.move(tmp_path / "m" / "10", tmp_path / "m" / "10.orbax-checkpoint-tmp-1")
    _, (layer,), notes = opened(tmp_path / "m")
    _, (two,), _ = opened(FOLDER / "manager" / "2")
    assert layer.running_mean is not None and two.running_mean is not None
    assert layer.running_mean.equal(two.running_mean)
    assert notes == ()


def test_several_checkpoints_are_not_taken_for_one() -> None:
    with pytest.raises(CheckpointError, match=r"checkpoints of Orbax \(.*give the directory of one of them"):
        opened(FOLDER)


def test_items_of_a_step_are_one_network(tmp_path: Path) -> None:
    """As a manager with items `params` and `batch_stats` leaves it."""
    for item in ("params", "batch_stats"):
        target = tmp_path / "3" / item
        shutil.copytree(FOLDER / "folders", target)
        (target / "_CHECKPOINT_METADATA").unlink()  # which, as in `manager`, lies above the items
        metadata = json.loads((target / "_METADATA").read_text())
        for name, entry in list(metadata["tree_metadata"].items()):
            first, *rest = (key["key"] for key in entry["key_metadata"])
            if first == item:
                entry["key_metadata"] = entry["key_metadata"][1:]
                (target / ".".join((first, *rest))).rename(target / ".".join(rest))
            else:
                del metadata["tree_metadata"][name]
        (target / "_METADATA").write_text(json.dumps(metadata))
    _, layers, notes = opened(tmp_path)
    check_layers(layers, ANSWERS["folders"])
    assert notes == ()


def test_links_are_not_followed(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "folders", tmp_path / "c")
    chunk = tmp_path / "c" / "batch_stats.BatchNorm_0.var" / "0"
    chunk.rename(tmp_path / "elsewhere")
    chunk.symlink_to(tmp_path / "elsewhere")
    _, (layer,), _ = opened(tmp_path / "c")
    assert layer.running_var is not None
    assert not layer.running_var.any()  # as a chunk that is not there: the fill value


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "zstandard" else find(name))
    with pytest.raises(OtherFormatError, match=r'pip install "bncli\[jax\]"'):
        opened(FOLDER / "ocdbt")


# ---- the store and the arrays


def store(path: Path, stack: ExitStack) -> dict[str, bytes]:
    folder = Folder(path, stack)
    return {
        key: value if isinstance(value, bytes) else folder.read_at(*value)
        for key, value in read_ocdbt(folder, "").items()
    }


def test_a_tree_of_several_levels_and_versions_is_read_as_tensorstore_does() -> None:
    expected = json.loads((FILES / "ocdbt" / "answers.json").read_text())
    with ExitStack() as stack:
        found = store(FILES / "ocdbt", stack)
    assert {key: value.decode() for key, value in found.items()} == expected
    assert len(expected) == 149  # of 150, one deleted


def test_a_changed_store_is_never_read_wrong(tmp_path: Path) -> None:
    """Nodes have checksums; only the values outside of the tree have none."""
    target = tmp_path / "s"
    shutil.copytree(FILES / "ocdbt", target)
    manifest = target / "manifest.ocdbt"
    data = manifest.read_bytes()
    for place in range(len(data)):
        manifest.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with ExitStack() as stack, pytest.raises(UnreadableFileError):
            store(target, stack)


def test_a_checksum_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C in the catalogue of CRCs


def zarr_2(**changed: object) -> bytes:
    said = {"zarr_format": 2, "shape": [5], "chunks": [2], "dtype": "<f4", "compressor": None, "order": "C"}
    return json.dumps({**said, "fill_value": 7.5, "filters": None, **changed}).encode()


def test_chunks_are_put_together_and_missing_ones_are_the_fill_value() -> None:
    import numpy as np

    chunks = {"0": np.float32([1, 2]).tobytes(), "2": np.float32([5, 99]).tobytes()}
    tensor = zarr_tensor("a", zarr_2(), lambda key, _: chunks.get(key))
    assert tensor is not None
    assert tensor.read().tolist() == [1, 2, 7.5, 7.5, 5]
    columns = {"0/0": np.float32([1, 2, 3, 4, 5, 6]).tobytes()}
    form = zarr_2(shape=[2, 3], chunks=[2, 3], order="F", dimension_separator="/")
    tensor = zarr_tensor("a", form, lambda key, _: columns.get(key))
    assert tensor is not None
    assert tensor.read().tolist() == [[1, 3, 5], [2, 4, 6]]
    for fill, expected in ((None, 0.0), ("-Infinity", -np.inf), (3, 3.0)):
        tensor = zarr_tensor("a", zarr_2(fill_value=fill), lambda *_: None)
        assert tensor is not None
        assert tensor.read().tolist() == [expected] * 5


def test_a_part_that_is_missing_in_a_shard_is_the_fill_value() -> None:
    import numpy as np

    plain = [{"name": "bytes", "configuration": {"endian": "little"}}]
    sharding = {"chunk_shape": [2], "codecs": plain, "index_codecs": plain, "index_location": "start"}
    said = {
        "zarr_format": 3,
        "shape": [4],
        "data_type": "float32",
        "fill_value": 7.5,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    index = np.array([2**64 - 1, 2**64 - 1, 32, 8], dtype="<u8").tobytes()
    shard = {"c/0": index + np.float32([3, 4]).tobytes()}
    tensor = zarr_tensor("a", json.dumps(said).encode(), lambda key, _: shard.get(key))
    assert tensor is not None
    assert tensor.read().tolist() == [7.5, 7.5, 3, 4]
    shard["c/0"] = shard["c/0"][:-1]
    tensor = zarr_tensor("a", json.dumps(said).encode(), lambda key, _: shard.get(key))
    assert tensor is not None
    with pytest.raises(UnreadableFileError, match="damaged or truncated"):
        tensor.read()


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": [2**40], "chunks": [1]},
        {"shape": [5], "chunks": [2**40]},
        {"chunks": [0]},
        {"chunks": [2, 2]},
        {"shape": [-1]},
        {"shape": None},
        {"fill_value": {}},
        {"fill_value": "much"},
        {"compressor": {"id": "blosc"}},
        {"filters": [{"id": "delta"}]},
        {"order": "X"},
    ],
)
def test_an_array_of_impossible_or_foreign_form_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(UnreadableFileError):  # some when the numbers are wanted
        tensor = zarr_tensor("a", zarr_2(**changed), lambda key, _: bytes(8) if key == "0" else None)
        assert tensor is not None
        tensor.read()


def test_what_expands_without_bounds_is_refused() -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(2**26))
    assert len(bomb) < 10_000
    with pytest.raises(UnreadableFileError, match="more than 1,000 bytes"):
        zstandard_frame.decompress(bomb, 1000)
    assert zstandard_frame.decompress(zstandard.ZstdCompressor().compress(b"abc"), 3) == b"abc"
    with pytest.raises(UnreadableFileError):
        zstandard_frame.decompress(bomb[:20] + b"\xff" * 20, 1000)


# ---- damage


def test_a_cut_file_is_refused_or_read(tmp_path: Path) -> None:
    for name in ("wide", "folders-zarr3", "sharded-zarr3"):
        target = tmp_path / name
        shutil.copytree(FOLDER / name, target)
        for file in sorted(target.rglob("*")):
            if file.is_file() and file.stat().st_size:
                whole = tmp_path / "whole"
                shutil.copy(file, whole)
                for _ in truncated(whole, file):
                    is_refused(target)
                shutil.copy(whole, file)


@pytest.mark.parametrize("name", ["ocdbt-zarr3", "folders", "sharded-zarr3"])
def test_a_changed_file_is_refused_or_read(tmp_path: Path, name: str) -> None:
    assert mutations(tmp_path, FOLDER / name, 60) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ocdbt-zarr3", "folders", "wide"])
def test_many_changed_files_are_refused_or_read(tmp_path: Path, name: str) -> None:
    assert mutations(tmp_path, FOLDER / name, 500) > 20


def test_metadata_without_a_tree_is_refused(tmp_path: Path) -> None:
    for content in (
        "{}",
        "[]",
        '{"tree_metadata": 3}',
        '{"tree_metadata": {"a": {"key_metadata": [3]}}}',
        "",
    ):
        (tmp_path / "_METADATA").write_text(content)
        with pytest.raises(CheckpointError) as caught:
            opened(tmp_path)
        assert "\n" not in str(caught.value)
