"""Files of Equinox: against what Equinox says of them (tests/frameworks/make_equinox.py), and broken ones."""

import io
from pathlib import Path

import numpy as np
import pytest

from bncli.batchnorm.conventions import EQUINOX
from bncli.errors import CheckpointError, NoBatchNormError, OtherFormatError
from tests.checkpoints.formats.damage import is_refused, mutations, truncated
from tests.checkpoints.formats.framework_answers import FILES, answers, check_layers, opened

FOLDER = FILES / "equinox"
ANSWERS = answers("equinox")
NO_NAMES = "Equinox writes no names: the layers are numbered in the order of the fields of its classes"


@pytest.mark.parametrize("file", ANSWERS)
def test_layers_are_those_of_equinox(file: str) -> None:
    kind, layers, notes = opened(FOLDER / file)
    assert kind == "equinox"
    # 1 - 0.99^t loses digits in float32, which Equinox computes it in
    check_layers(layers, ANSWERS[file], relative=1e-6 if file.startswith("batch") else 0)
    assert [layer.name for layer in layers] == [answer["name"] for answer in ANSWERS[file]]
    for layer, answer in zip(layers, ANSWERS[file], strict=True):
        assert (layer.convention, layer.eps, layer.hyperparameters_known) == (EQUINOX, None, False)
        assert layer.num_batches_tracked == answer.get("count")
    assert notes[0] == NO_NAMES


def test_where_the_momentum_matters_it_is_said() -> None:
    for file in ("batch-1.eqx", "batch-40.eqx"):
        _, _, notes = opened(FOLDER / file)
        assert "momentum is not in the file, and taken to be its default, 0.99" in notes[1]
    for file in ("ema.eqx", "untrained.eqx"):
        assert opened(FOLDER / file)[2] == (NO_NAMES,)


def test_a_model_without_its_state_has_no_statistics() -> None:
    with pytest.raises(NoBatchNormError, match="no BatchNorm layer with running statistics"):
        opened(FOLDER / "model-only.eqx")


def stream(*arrays: object) -> bytes:
    written = io.BytesIO()
    for array in arrays:
        np.save(written, np.asarray(array))
    return written.getvalue()


ROW = np.float32([1, 2, 3])
STATE = (np.bool_(False), ROW, ROW + 1)
DROPOUT = (0.25, np.bool_(False))


def test_what_looks_like_a_state_and_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.eqx"
    path.write_bytes(stream(ROW, ROW, np.bool_(False), *DROPOUT, ROW, ROW))  # BatchNorm, Dropout, LayerNorm
    with pytest.raises(NoBatchNormError):
        opened(path)
    path.write_bytes(stream(ROW, 5 * ROW, np.bool_(False), *DROPOUT, ROW, ROW, *STATE))
    _, (layer,), _ = opened(path)
    assert layer.bias is not None
    assert layer.bias.tolist() == [5, 10, 15]


def test_weights_that_cannot_be_told_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.eqx"
    path.write_bytes(stream(ROW[:2], ROW[:2], np.bool_(False), *STATE))  # of another length
    _, (layer,), notes = opened(path)
    assert layer.weight is None
    assert notes[1] == "which weight and bias belong to which statistics cannot be told"
    path.write_bytes(stream(*STATE, *STATE))  # a state by itself
    assert [layer.weight for layer in opened(path)[1]] == [None, None]
    path.write_bytes(stream(np.ones((3, 3), "f4"), ROW, np.bool_(False), *STATE))  # Linear, then no affine
    (layer,) = opened(path)[1]
    assert layer.weight is None


def test_a_layer_that_never_saw_a_batch_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.eqx").write_bytes(stream(np.bool_(True), ROW, ROW, *STATE))
    _, _, notes = opened(tmp_path / "a.eqx")
    assert notes[-1] == "batch_norm_0: never trained, the statistics are not even initialised"


def test_a_single_array_is_no_network(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROW)
    with pytest.raises(OtherFormatError, match="a NumPy array"):
        opened(tmp_path / "a.npy")


def test_a_cut_file_is_refused_or_has_fewer_layers(tmp_path: Path) -> None:
    for file in ("batch-40.eqx", "with-line.eqx"):
        refused = [is_refused(path) for path in truncated(FOLDER / file, tmp_path / file)]
        assert sum(refused) >= 18


@pytest.mark.parametrize("file", ["batch-40.eqx", "bfloat16.eqx"])
def test_a_changed_file_is_refused_or_read(tmp_path: Path, file: str) -> None:
    assert mutations(tmp_path, FOLDER / file, 60) > 3


@pytest.mark.slow
@pytest.mark.parametrize("file", ["batch-40.eqx"])
def test_many_changed_files_are_refused_or_read(tmp_path: Path, file: str) -> None:
    assert mutations(tmp_path, FOLDER / file, 500) > 20


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 9)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 3}",
        "{'descr': '<f99999999999999', 'fortran_order': False, 'shape': (3,)}",
        "{'descr': ['<f4'], 'fortran_order': False}",
        "__import__('os').system('false')",
        "(" * 5000,
        "",
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, header: str) -> None:
    text = header.encode()
    array = b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text
    (tmp_path / "a.eqx").write_bytes(stream(ROW) + array)
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path / "a.eqx")
    assert "\n" not in str(caught.value)
