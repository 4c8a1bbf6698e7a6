"""Files of Haiku: against what Haiku says of them (tests/frameworks/make_haiku.py), and broken ones."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bncli.batchnorm.conventions import FLAX, HAIKU
from bncli.errors import CheckpointError, OtherFormatError
from tests.checkpoints.formats.damage import is_refused, mutations, truncated
from tests.checkpoints.formats.framework_answers import FILES, answers, check_layers, opened

FOLDER = FILES / "haiku"
ANSWERS = answers("haiku")
Tree = dict[str, dict[str, np.ndarray]]


@pytest.mark.parametrize("file", ANSWERS)
def test_layers_are_those_of_haiku(file: str) -> None:
    kind, layers, _ = opened(FOLDER / file)
    assert kind == {".pkl": "haiku pickle", ".npz": "haiku npz", ".npy": "haiku npy"}[Path(file).suffix]
    check_layers(layers, ANSWERS[file])
    counts = {answer["name"]: answer["count"] for answer in ANSWERS[file]}
    for layer in layers:
        assert (layer.convention, layer.eps, layer.hyperparameters_known) == (HAIKU, None, False)
        assert layer.num_batches_tracked == counts[layer.name]


def test_the_order_of_calls_is_kept_where_the_file_has_it() -> None:
    _, layers, notes = opened(FOLDER / "jax-4.pkl")
    assert [layer.name for layer in layers] == [answer["name"] for answer in ANSWERS["jax-4.pkl"]]
    assert notes == ()
    _, layers, (note,) = opened(FOLDER / "numpy-4.pkl")  # which jax.device_get has sorted
    assert [layer.name for layer in layers][1:11] == [f"batch_norm_{index}" for index in range(1, 11)]
    assert "sorts names as text" in note


def test_a_layer_that_is_called_twice_has_counted_twice() -> None:
    layers = {layer.name: layer.num_batches_tracked for layer in opened(FOLDER / "jax-4.pkl")[1]}
    assert (layers["one_of_two"], layers["last"]) == (8, 4)


def test_a_state_alone_has_no_weight() -> None:
    _, layers, _ = opened(FOLDER / "state-only.pkl")
    assert len(layers) == 16
    assert all(layer.weight is None and layer.bias is None for layer in layers)


def averages(shape: tuple[int, ...], value: float) -> dict[str, np.ndarray]:
    return {
        "hidden": np.zeros(shape, "f4"),
        "average": np.full(shape, value, "f4"),
        "counter": np.int32(3),
    }


def state(shape: tuple[int, ...], layer: str = "bn") -> Tree:
    return {f"{layer}/~/{which}_ema": averages(shape, value) for which, value in (("mean", 1), ("var", 2))}


def test_layers_that_are_stacked_are_divided(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(({"bn": {"scale": np.ones((2, 1, 3), "f4")}}, state((2, 1, 3)))))
    _, layers, (note,) = opened(path)
    assert [(layer.name, layer.num_features) for layer in layers] == [("bn[0]", 3), ("bn[1]", 3)]
    assert "one array for several layers" in note
    for shape in ((1, 1, 1, 1), (1, 5), (1, 5, 1, 1)):  # the channels are the axis that is not 1
        path.write_bytes(pickle.dumps(state(shape)))
        _, (layer,), notes = opened(path)
        assert (layer.num_features, notes) == (max(shape), ())


def test_arrays_that_lie_by_column_and_big_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    content = state((2, 1, 3))
    average = np.asfortranarray(np.arange(6, dtype="f4").reshape(2, 1, 3))
    content["bn/~/mean_ema"]["average"] = average
    path.write_bytes(pickle.dumps(content))
    _, layers, _ = opened(path)
    assert [layer.running_mean.tolist() for layer in layers if layer.running_mean is not None] == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    np.savez(
        tmp_path / "a.npz",
        **{f"{name}/{leaf}": part for name, parts in content.items() for leaf, part in parts.items()},
    )
    assert [layer.running_mean.tolist() for layer in opened(tmp_path / "a.npz")[1]] == [[0, 1, 2], [3, 4, 5]]  # type: ignore[union-attr]
    content["bn/~/mean_ema"]["average"] = average.astype(">f4")
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError):  # better none than numbers that are wrong
        opened(path)


def test_trees_of_flax_are_read_from_such_files_as_well(tmp_path: Path) -> None:
    arrays = {"mean": np.ones(3, "f4"), "var": np.full(3, 2, "f4")}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"batch_stats": {"bn": arrays}}))
    np.savez(tmp_path / "a.npz", **{f"batch_stats/bn/{leaf}": array for leaf, array in arrays.items()})
    for file, expected in (("a.pkl", "flax pickle"), ("a.npz", "flax npz")):
        kind, (layer,), _ = opened(tmp_path / file)
        assert (kind, layer.name, layer.convention) == (expected, "bn", FLAX)
    # a mean and a variance alone are those of anything
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays))
    np.savez(tmp_path / "a.npz", **arrays)
    for file in ("a.pkl", "a.npz"):
        with pytest.raises(OtherFormatError):
            opened(tmp_path / file)


class Trap:
    """Would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "executed")


def test_nothing_is_executed(tmp_path: Path) -> None:
    content = {"params": {}, "state": state((1, 3)), "trap": Trap(tmp_path / "written")}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    np.savez(tmp_path / "a.npz", tree=np.array(content, dtype=object))
    np.save(tmp_path / "a.npy", np.array(content, dtype=object), allow_pickle=True)
    for file in ("a.pkl", "a.npz", "a.npy"):
        _, layers, _ = opened(tmp_path / file)
        assert [layer.name for layer in layers] == ["bn"]
    assert not (tmp_path / "written").exists()
    pickle.loads((tmp_path / "a.pkl").read_bytes())  # the trap is one
    assert (tmp_path / "written").exists()


def test_a_pickle_whose_parts_refer_to_one_another_without_end_is_refused(tmp_path: Path) -> None:
    bomb: list[object] = []
    for _ in range(64):  # 2^64 ways through it
        bomb = [bomb, bomb]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({**state((1, 3)), "bomb": bomb}))
    circle: dict[str, object] = dict(state((1, 3)))
    circle["circle"] = circle
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(circle))
    for file in ("a.pkl", "b.pkl"):
        assert is_refused(tmp_path / file)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    for file in ("numpy-2.pkl", "numpy-4.pkl", "numpy-5.pkl", "bar.npz", "objects.npz", "objects.npy"):
        for path in truncated(FOLDER / file, tmp_path / file):
            assert is_refused(path)


@pytest.mark.parametrize("file", ["numpy-4.pkl", "numpy-5.pkl", "objects.npy"])
def test_a_changed_file_is_refused_or_read(tmp_path: Path, file: str) -> None:
    assert mutations(tmp_path, FOLDER / file, 60) > 3


@pytest.mark.slow
@pytest.mark.parametrize("file", ["numpy-4.pkl", "numpy-5.pkl", "bar.npz", "objects.npy"])
def test_many_changed_files_are_refused_or_read(tmp_path: Path, file: str) -> None:
    assert mutations(tmp_path, FOLDER / file, 500) > 20


def test_an_archive_of_damaged_arrays_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\0\xff\xff{", b"\x93NUMPY\x01\0\x10\0{'descr': '<f4'}"):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("state/bn/~/mean_ema/average.npy", content)
        with pytest.raises(CheckpointError, match="array of NumPy"):
            opened(tmp_path / "a.npz")
