"""ONNX models of PyTorch's two exporters, against PyTorch's own statistics.

The files are made by tests/frameworks/make_onnx.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bncli.checkpoints import open_checkpoint
from bncli.errors import CheckpointError, NoBatchNormError
from tests.checkpoints.formats.damage import damaged, is_read
from tests.checkpoints.formats.framework_answers import check_answers, files_of
from tests.frameworks.recorded import FILES

PLACE = FILES / "onnx"


@pytest.mark.parametrize("file", files_of("onnx"))
def test_layers_are_those_of_pytorch(file: str) -> None:
    check_answers("onnx", file)


def test_arrays_merged_by_equal_content_are_read_by_position() -> None:
    names = {
        name
        for node in onnx.load(PLACE / "fresh.onnx").graph.node
        if node.op_type == "BatchNormalization"
        for name in node.input[3:]
    }
    assert not any("running" in name for name in names)  # the trap: other layers' weights and biases
    with open_checkpoint(PLACE / "fresh.onnx") as checkpoint:
        for layer in checkpoint.layers():
            assert (set(layer.running_mean.tolist()), set(layer.running_var.tolist())) == ({0}, {1})


def refusal(path: Path, error: type[CheckpointError] = CheckpointError) -> str:
    with pytest.raises(error) as caught, open_checkpoint(path):
        pass
    return str(caught.value).removeprefix(f"{path}: ")


def test_what_is_left_of_a_network_without_batch_norm_is_said(tmp_path: Path) -> None:
    text = refusal(PLACE / "nothing_left.onnx", NoBatchNormError)
    assert text.startswith(
        "an ONNX model without BatchNormalization (it has 1 Conv): 1 layer of it (1) had been"
    )
    save(tmp_path / "none.onnx", [helper.make_node("Relu", ["x"], ["y"])], {})
    assert refusal(tmp_path / "none.onnx", NoBatchNormError).startswith(
        "an ONNX model without BatchNormalization (it has 1 Relu); give the checkpoint"
    )


def test_a_layer_without_running_statistics_is_listed() -> None:
    with open_checkpoint(PLACE / "untracked.onnx") as checkpoint:
        tracked, untracked = checkpoint.layers()
        assert any("not stored but computed" in note and note.endswith(": 2") for note in checkpoint.notes)
    assert (tracked.name, untracked.name, untracked.num_features) == ("0", "2", 3)
    assert (untracked.running_mean, untracked.running_var) == (None, None)
    assert untracked.weight is not None


# ---- models of other tools, made with the library onnx


def save(path: Path, nodes: list[Any], arrays: dict[str, Any], **model: Any) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 2, 4])],
        [value("y", TensorProto.FLOAT, [1, 2, 4])],
        initializer=[numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    made = helper.make_model(graph, **model)
    onnx.save(made, path)
    return made


ARRAYS = {
    name: np.array([0.5, value], "f4") for name, value in (("s", 1), ("b", 2), ("m", 3), ("v", 4), ("w", 5))
}
NODE = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], name="a/b/bn", epsilon=1e-3)


def check_plain(path: Path, name: str = "a/b/bn") -> None:
    with open_checkpoint(path) as checkpoint:
        (layer,) = checkpoint.layers()
    assert (layer.name, layer.eps, layer.momentum) == (name, 1e-3, 0.1)
    found = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    assert [tensor.tolist() for tensor in found] == [[0.5, 1], [0.5, 2], [0.5, 3], [0.5, 4]]
    assert layer.convention.framework == "ONNX"


def test_constants_identities_functions_and_bodies_hold_layers_too(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    save(path, [NODE], ARRAYS)
    check_plain(path)
    constants = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))
        for name, array in ARRAYS.items()
    ]
    save(path, [*constants, NODE], {})
    check_plain(path)
    moved = {f"{name}0": array for name, array in ARRAYS.items()}
    identities = [helper.make_node("Identity", [f"{name}0"], [name]) for name in ARRAYS]
    save(path, [*identities, NODE], moved)
    check_plain(path)
    branch = helper.make_graph(
        [NODE], "then", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "else",
        [],
        [helper.make_tensor_value_info("y", 1, None)],
    )
    save(
        path,
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other)],
        {**ARRAYS, "c": np.array(True)},
    )
    check_plain(path)
    function = helper.make_function(
        "own", "Norm", ["x", "s", "b", "m", "v"], ["y"], [NODE], [helper.make_opsetid("", 20)]
    )
    call = helper.make_node("Norm", ["x", "s0", "b0", "m0", "v0"], ["y"], domain="own")
    save(path, [call], moved, functions=[function])
    check_plain(path)
    with open_checkpoint(path) as checkpoint:
        assert "w0" in checkpoint.tensors  # what no BatchNorm takes in


def test_numbers_without_raw_data_are_read(tmp_path: Path) -> None:
    model = save(tmp_path / "a.onnx", [NODE], {})
    for name, array in ARRAYS.items():
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [2], array))
    onnx.save(model, tmp_path / "a.onnx")
    check_plain(tmp_path / "a.onnx")


def external(path: Path, location: str = "a.data") -> onnx.ModelProto:
    model = save(path, [NODE], ARRAYS)
    onnx.save(model, path, save_as_external_data=True, location="a.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    for array in model.graph.initializer:
        array.external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    return model


def test_numbers_in_another_file_are_read_and_never_from_elsewhere(tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    external(place / "a.onnx")
    check_plain(place / "a.onnx")
    (place / "linked.data").symlink_to(place / "a.data")
    external(place / "a.onnx", "linked.data")
    check_plain(place / "a.onnx")
    (tmp_path / "a.data").write_bytes((place / "a.data").read_bytes())
    for location in ("../a.data", str(tmp_path / "a.data"), "file:///a.data", "..", ""):
        external(place / "a.onnx", location)
        assert "no plain name of a file beside it" in refusal(place / "a.onnx")
    (place / "out.data").symlink_to(tmp_path / "a.data")
    external(place / "a.onnx", "out.data")
    assert "a link that leads elsewhere" in refusal(place / "a.onnx")
    external(place / "a.onnx")
    (place / "a.data").unlink()
    assert refusal(place / "a.onnx") == "its numbers lie in a.data, which is not beside it; put it there"
    (place / "a.data").write_bytes(bytes(7))
    assert "ends before a tensor" in refusal(place / "a.onnx")


def test_a_cache_of_links_into_one_folder_is_followed(tmp_path: Path) -> None:
    for name in ("blobs", "snapshot"):
        (tmp_path / name).mkdir()
    external(tmp_path / "blobs" / "a.onnx")
    for name in ("a.onnx", "a.data"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    check_plain(tmp_path / "snapshot" / "a.onnx")


@pytest.mark.parametrize("num_flipped", [60, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", ["dynamo.onnx", "training_17.onnx"])
def test_damage_is_said_in_one_line(tmp_path: Path, file: str, num_flipped: int) -> None:
    content = (PLACE / file).read_bytes()
    read = [is_read(tmp_path / "a.onnx", data) for data in damaged(content, num_flipped)]
    assert not any(read[:20])
    assert any(read[20:])


def test_functions_that_call_themselves_end(tmp_path: Path) -> None:
    call = helper.make_node("F", ["x"], ["y"], domain="own")
    function = helper.make_function("own", "F", ["x"], ["y"], [call] * 10, [helper.make_opsetid("", 20)])
    save(tmp_path / "a.onnx", [call], {}, functions=[function])
    assert "nested without end" in refusal(tmp_path / "a.onnx")
