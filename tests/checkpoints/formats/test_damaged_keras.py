"""Damaged and hostile files of Keras and TensorFlow: refused in one line, soon and in little memory."""

import shutil
from pathlib import Path

import pytest

from tests.checkpoints.formats.corpus import unpack
from tests.checkpoints.formats.damage import cuts, flips, read_or_refuse

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
