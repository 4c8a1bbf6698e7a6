"""Damaged and hostile files of Keras and TensorFlow: refused in one line, soon and in little memory."""

import base64
import json
import marshal
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import pytest

from bncli.checkpoints import open_checkpoint
from bncli.errors import OtherFormatError
from tests.checkpoints.formats.damage import cuts, flips, read_or_refuse
from tests.checkpoints.formats.framework_answers import unpack

# of which corpus, what is opened, and the part of it that is damaged
CASES = {
    "legacy h5": ("keras", "nested.h5", "nested.h5"),
    "keras": ("keras", "wrapped.keras", "wrapped.keras"),
    "weights": ("tf_keras", "nested.weights.h5", "nested.weights.h5"),
    "compressed": ("keras", "compressed.weights.h5", "compressed.weights.h5"),
    "folder": ("keras", "flat_folder", "flat_folder/model.weights.h5"),
    "config": ("keras", "flat_folder", "flat_folder/config.json"),
    "shard index": ("keras", "sharded/flat.weights.json", "sharded/flat.weights.json"),
    "shard": ("keras", "sharded/flat.weights.json", "sharded/flat_00001.weights.h5"),
    "index": ("keras", "checkpoints", "checkpoints/ck-1.index"),
    "divided": ("tf_keras", "v1_divided", "v1_divided/model.ckpt.index"),
    "data": ("keras", "checkpoints", "checkpoints/ck-1.data-00000-of-00001"),
    "index of a SavedModel": ("keras", "nested_export", "nested_export/variables/variables.index"),
    "metadata": ("tf_keras", "nested_saved", "nested_saved/keras_metadata.pb"),
    "old metadata": ("tf_keras", "nested_saved_2020", "nested_saved_2020/saved_model.pb"),
    "meta graph": ("tf_keras", "v1/model.ckpt", "v1/model.ckpt.meta"),
    "first format": ("tf_keras", "v1_single/model.ckpt", "v1_single/model.ckpt"),
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("keras", "tf_keras")}
    for name, folder in folders.items():
        unpack(name, folder)
    return folders


def place(corpora: dict[str, Path], case: str, tmp_path: Path) -> tuple[Path, Path]:
    """A copy: what is opened, and the part that is damaged."""
    corpus, opened, part = CASES[case]
    top = opened.partition("/")[0]
    source = corpora[corpus] / top
    if source.is_dir():
        shutil.copytree(source, tmp_path / top)
    else:
        shutil.copy(source, tmp_path / top)
    return tmp_path / opened, tmp_path / part


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_ends_early_is_refused_in_one_line(
    corpora: dict[str, Path], case: str, tmp_path: Path
) -> None:
    opened, part = place(corpora, case, tmp_path)
    content = part.read_bytes()
    said = []
    for cut in cuts(content):
        part.write_bytes(cut)
        said.append(read_or_refuse(opened))
    may_lack_its_end = {"data", "metadata", "old metadata", "meta graph"}
    assert case in may_lack_its_end or all(said)


@pytest.mark.parametrize("case", CASES)
def test_a_file_with_other_bytes_is_read_or_refused(
    corpora: dict[str, Path], case: str, tmp_path: Path
) -> None:
    opened, part = place(corpora, case, tmp_path)
    # each array of the compressed file is unpacked, and costs more
    for damaged in flips(part.read_bytes(), 10 if case == "compressed" else 60, seed=1):
        part.write_bytes(damaged)
        read_or_refuse(opened)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_file_with_other_bytes_is_read_or_refused_500_times(
    corpora: dict[str, Path], case: str, tmp_path: Path
) -> None:
    opened, part = place(corpora, case, tmp_path)
    for damaged in flips(part.read_bytes(), 500, seed=2):
        part.write_bytes(damaged)
        read_or_refuse(opened)


# ---- hostile on purpose


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("giant", "it has no layers"),
        ("bomb", "far larger than those of any network"),
        ("laughs", "leads in a circle"),
        ("external", "one that points to other files, which bncli does not follow"),
        ("elsewhere", "an array lies beyond its end"),  # its numbers are in another file
    ],
)
def test_hdf5_that_claims_too_much_is_refused_in_little_memory(
    corpora: dict[str, Path], name: str, said: str
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = read_or_refuse(corpora["keras"] / "hostile" / f"{name}.weights.h5")
    assert said in (text or "")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


@pytest.mark.parametrize("bomb", ["config.json", "model.weights.h5"])
def test_an_archive_that_expands_without_bounds_is_refused(
    corpora: dict[str, Path], tmp_path: Path, bomb: str
) -> None:
    path = tmp_path / "a.keras"
    with (
        zipfile.ZipFile(corpora["keras"] / "flat.keras") as sound,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in sound.namelist():
            archive.writestr(name, sound.read(name) + bytes(2**26 if name == bomb else 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "too much of it is compressed" in (read_or_refuse(path) or "")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


def test_a_shard_by_itself_is_no_network(corpora: dict[str, Path], tmp_path: Path) -> None:
    """Of a layer that is divided it has beta and mean, which look like mean and variance."""
    for number in range(5):
        source = corpora["keras"] / "sharded" / f"flat_0000{number}.weights.h5"
        said = "one of several files of a network; give flat.weights.json, as a layer may be divided"
        assert said in (read_or_refuse(source) or "")
        shutil.copy(source, tmp_path)
    for number in (3, 4):  # whose first layer begins in the file before
        said = "are missing; where a network lies in several files, give the .weights.json"
        assert said in (read_or_refuse(tmp_path / f"flat_0000{number}.weights.h5") or "")
    with open_checkpoint(tmp_path / "flat_00002.weights.h5") as checkpoint:  # nothing else tells of it
        assert "named as one of several files: if it is, give their flat.weights.json" in checkpoint.notes[-1]


def test_no_lambda_layer_is_built(corpora: dict[str, Path], tmp_path: Path) -> None:
    """Keras keeps its function as bytes of compiled code, which loading would run."""
    harmed = tmp_path / "harmed"
    code = compile(f"open({str(harmed)!r}, 'w').close()", "harm", "exec")
    function = base64.b64encode(marshal.dumps(code)).decode()
    entry = {
        "module": "keras.layers", "class_name": "Lambda", "registered_name": None,
        "config": {"name": "lambda", "function": {"class_name": "__lambda__", "config": {"code": function}}},
    }  # fmt: skip
    path = tmp_path / "a.keras"
    with zipfile.ZipFile(corpora["keras"] / "flat.keras") as sound, zipfile.ZipFile(path, "w") as archive:
        for name in sound.namelist():
            content = sound.read(name)
            if name == "config.json":
                config = json.loads(content)
                config["config"]["layers"].insert(1, entry)
                content = json.dumps(config).encode()
            archive.writestr(name, content)
    with open_checkpoint(path) as checkpoint, open_checkpoint(corpora["keras"] / "flat.keras") as other:
        assert checkpoint.layer_names == other.layer_names
        assert [layer.eps for layer in checkpoint.layers()] == [layer.eps for layer in other.layers()]
    assert not harmed.exists()
    exec(marshal.loads(base64.b64decode(function)))  # it is one
    assert harmed.exists()


def test_a_group_inside_itself_is_read_once(corpora: dict[str, Path]) -> None:
    with open_checkpoint(corpora["keras"] / "hostile" / "circle.weights.h5") as checkpoint:
        assert checkpoint.layer_names == ("batch_normalization",)


def test_an_hdf5_file_of_another_program_is_named(corpora: dict[str, Path]) -> None:
    with (
        pytest.raises(OtherFormatError, match="an HDF5 file, but not one that Keras wrote"),
        open_checkpoint(corpora["keras"] / "other.h5"),
    ):
        pass


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def block(entries: list[tuple[int, bytes, bytes]]) -> bytes:
    """A block of a table: of each entry what its key shares, the rest of the key, the value."""
    content = b"".join(
        varint(shared) + varint(len(key)) + varint(len(value)) + key + value for shared, key, value in entries
    )
    return content + struct.pack("<II", 0, 1)


def table(*blocks: bytes, handles: list[tuple[int, int]] | None = None) -> bytes:
    """The index of a checkpoint, with the blocks where it says, or where the test says."""
    content, places = b"", []
    for one in blocks:
        places.append((len(content), len(one)))
        content += one + bytes(5)  # not compressed, and a checksum
    places = places if handles is None else handles
    index = block(
        [
            (0, struct.pack(">I", number), varint(start) + varint(size))
            for number, (start, size) in enumerate(places)
        ]
    )
    footer = varint(0) + varint(0) + varint(len(content)) + varint(len(index))
    return content + index + bytes(5) + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def entry(size: int, *shape: int, shard: int = 0, offset: int = 0) -> bytes:
    lengths = b"".join(b"\x12" + varint(len(one)) + one for one in (b"\x08" + varint(n) for n in shape))
    numbers = b"\x18" + varint(shard) + b"\x20" + varint(offset) + b"\x28" + varint(size)
    return b"\x08\x01\x12" + varint(len(lengths)) + lengths + numbers


HEADER = (0, b"", b"\x08\x01")
BN = [(0, b"bn/moving_mean", entry(8, 2)), (10, b"variance", entry(8, 2, offset=8))]
GIANT = 2**40


def lying(size: int, *shape: int, shard: int = 0) -> bytes:
    """An index whose two arrays claim this."""
    return table(block([HEADER, *((shared, key, entry(size, *shape, shard=shard)) for shared, key, _ in BN)]))


HOSTILE_TABLES = {
    "sound": (table(block([HEADER, *BN])), None),
    "giant arrays": (lying(4 * GIANT, GIANT), "far larger"),
    "arrays beyond the file": (lying(4 * 99, 99), "ends before"),
    "another size than the shape": (lying(8, 3), "shape"),
    "a file that is not there": (lying(8, 2, shard=7), "7-of-"),
    "a billion files": (table(block([(0, b"", b"\x08" + varint(2**30)), *BN])), "files"),
    "keys that grow": (
        table(block([HEADER, *((900 * n, b"x" * 900, b"") for n in range(1100))])),
        "a damaged",
    ),
    "one block again and again": (
        table(block([HEADER, *BN]), handles=[(0, len(block([HEADER, *BN])))] * 1000),
        "overlap",
    ),
    "a key that shares more than there is": (table(block([HEADER, (99, b"x", b"")])), "a damaged"),
    "big-endian": (table(block([(0, b"", b"\x08\x01\x10\x01"), *BN])), "big-endian"),
    "restarts without end": (table(block([HEADER])[:-4] + b"\xff\xff\xff\xff"), "a damaged"),
}


@pytest.mark.parametrize("case", HOSTILE_TABLES)
def test_an_index_that_claims_too_much_is_refused(tmp_path: Path, case: str) -> None:
    content, said = HOSTILE_TABLES[case]
    (tmp_path / "ck.index").write_bytes(content)
    (tmp_path / "ck.data-00000-of-00001").write_bytes(struct.pack("<4f", 1, 2, 3, 4))
    text = read_or_refuse(tmp_path / "ck.index")
    assert text is None if said is None else said in (text or "read")


def test_the_list_of_checkpoints_leads_nowhere_else(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder, names in ((inside, ("a", "b")), (outside, ("c",))):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.index").write_bytes(HOSTILE_TABLES["sound"][0])
            (folder / f"{name}.data-00000-of-00001").write_bytes(struct.pack("<4f", 1, 2, 3, 4))
    (inside / "checkpoint").write_text(f'model_checkpoint_path: "{outside}/c"\n')
    assert "2 TensorFlow checkpoints; give one: a.index, b.index" in (read_or_refuse(inside) or "")
    (inside / "checkpoint").write_text('model_checkpoint_path: "/home/of/its/author/b"\n')
    assert read_or_refuse(inside) is None
    for name in ("a", "b"):
        (inside / f"{name}.data-00000-of-00001").unlink()
        (inside / f"{name}.data-00000-of-00001").symlink_to(outside / "c.data-00000-of-00001")
    assert "a directory of TensorFlow checkpoints" in (read_or_refuse(inside) or "")


@pytest.mark.parametrize(
    ("part", "opened", "linked"),
    [
        ("sharded", "flat.weights.json", "flat_00001.weights.h5"),
        ("checkpoints", "ck-1.index", "ck-1.data-00000-of-00001"),
    ],
)
def test_a_file_beside_it_may_be_no_link_that_leads_elsewhere(
    corpora: dict[str, Path], tmp_path: Path, part: str, opened: str, linked: str
) -> None:
    folder = Path(shutil.copytree(corpora["keras"] / part, tmp_path / part))
    (folder / linked).rename(folder / "there")
    (folder / linked).symlink_to("there")
    assert read_or_refuse(folder / opened) is None
    (folder / "there").rename(tmp_path / "there")
    (folder / linked).unlink()
    (folder / linked).symlink_to("../there")
    assert "is a link that leads elsewhere; bncli follows none" in (read_or_refuse(folder / opened) or "")


def test_an_index_of_shards_names_files_beside_it_only(corpora: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(corpora["keras"] / "sharded", tmp_path / "sharded")
    path = tmp_path / "sharded" / "flat.weights.json"
    path.write_text(path.read_text().replace("flat_00001", "../sharded/flat_00001"))
    assert "no plain name of a file beside it" in (read_or_refuse(path) or "")
