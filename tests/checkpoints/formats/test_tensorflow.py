"""What TensorFlow's checkpoints make hard: which file is meant, whose a variable is, what is in no file."""

import struct
from pathlib import Path

import fsspec
import pytest

from bncli.checkpoints import open_checkpoint
from bncli.checkpoints.byte_source import open_source
from bncli.checkpoints.formats.tensorflow_bundle import table_entries
from bncli.errors import CheckpointError
from tests.checkpoints.formats.framework_answers import Corpus, unpack
from tests.checkpoints.formats.test_damaged_keras import HEADER, block, entry, table
from tests.conftest import Bncli


@pytest.fixture(scope="module")
def keras_2(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return unpack("tf_keras", tmp_path_factory.mktemp("tf_keras"))


@pytest.fixture(scope="module")
def keras_3(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return unpack("keras", tmp_path_factory.mktemp("keras"))


def test_a_checkpoint_is_found_by_directory_index_and_prefix_alike(keras_3: Corpus) -> None:
    means = set()
    for name in ("checkpoints", "checkpoints/ck-1.index", "checkpoints/ck-1"):
        _, layers = keras_3.open(name)
        means.add(str([layer.running_mean for layer in layers]))
    assert len(means) == 1


def test_a_saved_model_is_found_by_directory_and_by_its_pb(keras_2: Corpus) -> None:
    for name in ("nested_saved", "nested_saved/saved_model.pb"):
        checkpoint, layers = keras_2.open(name)
        assert checkpoint.kind == "tensorflow savedmodel"
        assert {layer.eps for layer in layers} == {0.02, 1e-3, 0.03}  # from keras_metadata.pb


def test_a_saved_model_is_found_without_its_pb(keras_3: Corpus) -> None:
    """Whose graph may be text (`saved_model.pbtxt`), or in parts (`saved_model.cpb`)."""
    for name in ("nested_saved", "subclassed_export"):
        assert not (keras_3.folder / name / "saved_model.pb").exists()
        checkpoint, layers = keras_3.open(name)
        assert checkpoint.kind == "tensorflow savedmodel"
        assert len(layers) > 3


def test_a_saved_model_at_a_url_is_read_with_the_files_beside_it(keras_2: Corpus) -> None:
    folder = keras_2.folder / "nested_saved"
    for path in folder.rglob("*"):
        if path.is_file():
            with fsspec.open(f"memory://saved/{path.relative_to(folder).as_posix()}", "wb") as file:
                file.write(path.read_bytes())
    with open_checkpoint("memory://saved/saved_model.pb") as checkpoint:
        assert [layer.eps for layer in checkpoint.layers()] == [0.02, 1e-3, 0.03]


def test_gamma_under_the_optimizers_keys_is_the_layers(keras_3: Corpus) -> None:
    """The corpus has that trap: after fit, gamma of the nested layer has no key of the layer's."""
    with open_source(str(keras_3.folder / "checkpoints" / "ck-1.index")) as index:
        keys = [key.decode() for key, _, _ in table_entries(index)]
    assert sum("_operations" in key and "/moving_mean/" in key for key in keys) == 5
    assert sum("_operations" in key and "/gamma/" in key for key in keys) < 5
    _, layers = keras_3.open("checkpoints/ck-1.index")
    assert all(layer.weight is not None for layer in layers)


def test_exported_variables_are_stored_twice_and_read_once(keras_3: Corpus) -> None:
    with open_source(str(keras_3.folder / "nested_export" / "variables" / "variables.index")) as index:
        keys = [key.decode() for key, _, _ in table_entries(index)]
    assert sum(key.startswith("_all_variables/") for key in keys) == sum(
        key.startswith("variables/") for key in keys
    )
    checkpoint, layers = keras_3.open("nested_export")
    assert len(layers) == len({layer.name for layer in layers}) == 5
    assert len(checkpoint.tensors) == sum(key.startswith("variables/") for key in keys)


def test_numbers_may_lie_in_several_files(keras_2: Corpus) -> None:
    files = sorted(path.name for path in (keras_2.folder / "v1_sharded").glob("*.data-*"))
    assert files == ["model.ckpt.data-00000-of-00002", "model.ckpt.data-00001-of-00002"]
    (keras_2.folder / "v1_sharded" / files[1]).rename(keras_2.folder / "away")
    with pytest.raises(Exception, match=files[1]):
        keras_2.open("v1_sharded/model.ckpt.index")
    (keras_2.folder / "away").rename(keras_2.folder / "v1_sharded" / files[1])


def test_the_order_of_tensorflow_1_is_that_of_its_graph(keras_2: Corpus, tmp_path: Path) -> None:
    _, layers = keras_2.open("v1/model.ckpt")
    assert [layer.name for layer in layers] == ["zz", "block/a_10", "block/a_2"]  # as they were made
    for path in (keras_2.folder / "v1").glob("model.ckpt.[id]*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with open_checkpoint(tmp_path / "model.ckpt.index") as checkpoint:  # without the graph
        assert checkpoint.layer_names == ("block/a_2", "block/a_10", "zz")
        assert "in the order of their names" in checkpoint.notes[0]


def test_a_moving_average_beside_the_arrays_is_told(tmp_path: Path) -> None:
    leaves = ("beta", "gamma", "moving_mean", "moving_variance")
    keys = [f"bn/{leaf}{end}".encode() for leaf in leaves for end in ("", "/ExponentialMovingAverage")]
    (tmp_path / "m.index").write_bytes(
        table(block([HEADER, *((0, key, entry(8, 2, offset=8 * place)) for place, key in enumerate(keys))]))
    )
    numbers = struct.pack("<16f", *range(1, 17))
    (tmp_path / "m.data-00000-of-00001").write_bytes(numbers)
    with open_checkpoint(tmp_path / "m.index") as checkpoint:
        (layer,) = checkpoint.layers()
    assert layer.running_mean is not None
    assert layer.running_mean.tolist() == [9, 10]
    assert any("4 of these arrays have a moving average" in note for note in checkpoint.notes)


def test_what_no_file_of_the_checkpoint_has_is_said_to_be_unknown(bncli: Bncli, keras_3: Corpus) -> None:
    outcome = bncli("inspect-stats", keras_3.folder / "checkpoints", "--json")
    assert outcome.code in (0, 1)
    assert "momentum" in bncli("inspect-stats", keras_3.folder / "checkpoints").out
    assert all(layer["eps"] is None for layer in outcome.json["layers"])


def test_a_checkpoint_without_a_name_is_read(keras_2: Corpus, tmp_path: Path) -> None:
    """As in the package musicnn 0.1.0: `.index` and `.data-00000-of-00001`."""
    for path in (keras_2.folder / "v1").glob("model.ckpt.*"):
        (tmp_path / path.name.removeprefix("model.ckpt")).write_bytes(path.read_bytes())
    for source in (tmp_path, tmp_path / ".index"):
        with open_checkpoint(source) as checkpoint:
            assert checkpoint.layer_names == ("zz", "block/a_10", "block/a_2")
            assert checkpoint.layers()


def slices(*pieces: tuple[int, int]) -> bytes:
    """Field 7 of an entry: where each part of one dimension begins, and its length."""
    extents = [
        (b"\x08" + bytes([start]) if start else b"") + b"\x10" + bytes([size]) for start, size in pieces
    ]
    messages = [b"\x0a" + bytes([len(extent)]) + extent for extent in extents]
    return b"".join(b"\x3a" + bytes([len(message)]) + message for message in messages)


def part(name: bytes, start: int, length: int) -> bytes:
    """The key of a slice, as tensorflow/core/lib/strings/ordered_code writes it for small numbers."""
    return b"\0" + name + b"\0\1" + b"\1\1" + bytes([0x80 + start, 0x80 + length])


PARTS = [
    (0, part(b"bn/gamma", 0, 2), entry(8, 2, offset=16)),
    (0, part(b"bn/gamma", 2, 1), entry(4, 1, offset=24)),
]
WHOLE = [(0, b"bn/gamma", entry(0, 3) + slices((2, 1), (0, 2)))]
STATISTICS = [(0, b"bn/moving_mean", entry(12, 3)), (10, b"variance", entry(12, 3))]


def written(folder: Path, *entries: tuple[int, bytes, bytes]) -> Path:
    (folder / "m.index").write_bytes(table(block([HEADER, *entries])))
    (folder / "m.data-00000-of-00001").write_bytes(struct.pack("<7f", *range(1, 8)))
    return folder / "m.index"


def test_a_variable_in_parts_is_put_together(tmp_path: Path) -> None:
    with open_checkpoint(written(tmp_path, *PARTS, *WHOLE, *STATISTICS)) as checkpoint:
        (layer,) = checkpoint.layers()
    assert layer.weight is not None
    assert layer.weight.tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([*PARTS[:1], *WHOLE, *STATISTICS], "slices of bn/gamma are missing"),
        ([*WHOLE, *STATISTICS], "slices of bn/gamma are missing"),
        ([*PARTS, (0, b"bn/gamma", entry(0, 3) + slices((1, 2), (0, 1))), *STATISTICS], "another shape"),
        (
            [*PARTS, (0, b"bn/gamma", entry(0, 3) + slices((1, 1), (0, 2))), *STATISTICS],
            "another shape|overl",
        ),
        ([*PARTS, (0, b"bn/gamma", entry(0, 4) + slices((2, 1), (0, 2))), *STATISTICS], "do not make it up"),
        ([*PARTS, (0, b"bn/gamma", entry(0, 3) + b"\x3a\0\x3a\0"), *STATISTICS], "has other dimensions"),
    ],
)
def test_parts_that_do_not_make_up_a_variable_are_refused(
    tmp_path: Path, entries: list[tuple[int, bytes, bytes]], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said), open_checkpoint(written(tmp_path, *entries)) as found:
        found.layers()


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content


def test_parts_in_the_first_format_are_named_as_left_out(tmp_path: Path) -> None:
    """SavedTensorSlices: first names, types and shapes, then the numbers of each slice."""
    known = [
        field(1, field(1, name) + field(2, field(2, b"\x08\x02")) + b"\x18\x01")
        for name in (b"bn/gamma", b"bn/moving_mean", b"bn/moving_variance")
    ]

    def saved(name: bytes, *numbers: float) -> bytes:
        return field(2, field(1, name) + field(3, field(5, struct.pack(f"<{len(numbers)}f", *numbers))))

    entries = [
        (0, b"", field(1, b"".join(known))),
        (0, b"a", saved(b"bn/gamma", 1)), (0, b"b", saved(b"bn/gamma", 2)),
        (0, b"c", saved(b"bn/moving_mean", 3, 4)), (0, b"d", saved(b"bn/moving_variance", 5, 6)),
    ]  # fmt: skip
    (tmp_path / "model.ckpt").write_bytes(table(block(entries)))
    with open_checkpoint(tmp_path / "model.ckpt") as checkpoint:
        (layer,) = checkpoint.layers()
    assert layer.running_var is not None
    assert (layer.weight, layer.running_var.tolist()) == (None, [5, 6])
    assert any("left out, as they are divided: bn/gamma; TensorFlow" in note for note in checkpoint.notes)


def test_numbers_that_changed_are_told_by_their_checksum(keras_3: Corpus, tmp_path: Path) -> None:
    source = keras_3.folder / "checkpoints"
    (data,) = source.glob("*.data-*")
    with open_checkpoint(source / "ck-1.index") as checkpoint:
        mean = next(layer.running_mean for layer in checkpoint.layers())
    assert mean is not None
    content = data.read_bytes()
    place = content.index(mean.numpy().tobytes())
    (tmp_path / "ck-1.index").write_bytes((source / "ck-1.index").read_bytes())
    (tmp_path / data.name).write_bytes(content)
    with open_checkpoint(tmp_path / "ck-1.index") as checkpoint:
        checkpoint.layers()
    changed = bytearray(content)
    changed[place] ^= 1
    (tmp_path / data.name).write_bytes(changed)
    with (
        open_checkpoint(tmp_path / "ck-1.index") as checkpoint,
        pytest.raises(CheckpointError, match="the checksum of a variable does not fit"),
    ):
        checkpoint.layers()
