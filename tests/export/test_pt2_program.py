"""A .pt2 file is opened only if it computes, and does nothing else."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bncli.errors import CheckpointError
from bncli.export.pt2_program import check_pt2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    program = torch.export.export(
        network.eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("N")},)
    )
    torch.export.save(program, path)
    return path


def changed(
    saved: Path, folder: Path, change: Callable[[Any], None], name: str = "models/model.json"
) -> Path:
    """A copy with one description changed."""
    path = folder / "changed.pt2"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith(name):
                values = json.loads(content)
                change(values)
                content = json.dumps(values).encode()
            new.writestr(entry.filename, content)
    return path


def test_what_torch_export_saves_of_a_network_is_let_through(saved: Path) -> None:
    check_pt2(saved)


def first_node(values: Any) -> Any:
    return values["graph_module"]["graph"]["nodes"][0]


def test_other_calls_than_of_operators_are_refused(saved: Path, tmp_path: Path) -> None:
    for target in ("torch.hub.load", "_operator.attrgetter.x", "math", "torch.ops.aten.add", "#other"):
        path = changed(
            saved, tmp_path, lambda values, target=target: first_node(values).update(target=target)
        )
        with pytest.raises(CheckpointError, match=r"may run code: it calls"):
            check_pt2(path)


def expressions(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [found for one in value for found in expressions(one)]
    if not isinstance(value, dict):
        return []
    mine = [value] if "expr_str" in value else []
    return mine + [found for one in value.values() for found in expressions(one)]


@pytest.mark.parametrize("text", ["print(1)", "s1.name", "Symbol('s1').name", "a", "__name__", "s1[0]"])
def test_texts_that_are_no_sizes_are_refused(saved: Path, tmp_path: Path, text: str) -> None:
    def change(values: Any) -> None:
        found = expressions(values)
        assert found
        found[0]["expr_str"] = text

    with pytest.raises(CheckpointError, match=r"may run code: it evaluates"):
        check_pt2(changed(saved, tmp_path, change))


def test_guards_pickles_and_objects_are_refused(saved: Path, tmp_path: Path) -> None:
    path = changed(saved, tmp_path, lambda values: values.update(guards_code=["True"]))
    with pytest.raises(CheckpointError, match="Python code"):
        check_pt2(path)

    def pickled(values: Any) -> None:
        next(iter(values["config"].values()))["use_pickle"] = True

    path = changed(saved, tmp_path, pickled, "model_weights_config.json")
    with pytest.raises(CheckpointError, match="it holds a pickle"):
        check_pt2(path)

    def special(values: Any) -> None:
        spec = values["graph_module"]["module_call_graph"][0]["signature"]
        spec["in_spec"] = spec["in_spec"].replace("builtins.tuple", "collections.deque")

    with pytest.raises(CheckpointError, match="objects of its own"):
        check_pt2(changed(saved, tmp_path, special))


def test_a_damaged_file_is_called_so(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.pt2"
    path.write_bytes(saved.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"half\.pt2: a damaged torch\.export file"):
        check_pt2(path)
