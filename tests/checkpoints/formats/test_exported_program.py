"""Programs of torch.export, against the state dict of the network that was exported.

The files are made by tests/frameworks/make_exported.py, which also checks that torch reads those that were
repacked.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bncli.checkpoints import open_checkpoint
from bncli.checkpoints.rewrite import rewrite
from bncli.errors import CheckpointError
from tests.checkpoints.formats.damage import mutations
from tests.frameworks.recorded import FILES

STATE = {"eval": "eval", "layout_2_8": "eval", "layout_2_7": "eval", "train": "train",
         "decomposed": "train", "bfloat16": "bfloat16"}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    with zipfile.ZipFile(FILES / "exported" / "files.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize("name", STATE)
def test_every_tensor_is_that_of_the_network_in_its_order(corpus: Path, name: str) -> None:
    """Also where it is a view of a larger storage, in channels_last, and in bfloat16."""
    expected = torch.load(corpus / f"{STATE[name]}.pt", weights_only=True)
    with open_checkpoint(corpus / f"{name}.pt2") as checkpoint:
        assert checkpoint.kind == "torch exported program"
        assert list(checkpoint.tensors) == list(expected)
        for key, tensor in checkpoint.tensors.items():
            found = tensor.read()
            assert found.dtype == expected[key].dtype and torch.equal(found, expected[key]), key
        for layer in checkpoint.layers():
            if layer.running_mean is not None:
                assert torch.equal(layer.running_mean, expected[f"{layer.name}.running_mean"])


@pytest.mark.parametrize("name", STATE)
def test_eps_and_momentum_come_from_the_graph(corpus: Path, name: str) -> None:
    with open_checkpoint(corpus / f"{name}.pt2") as checkpoint:
        layers = {layer.name: layer for layer in checkpoint.layers()}
        notes = " ".join(checkpoint.notes)
    eps = {"bn": 1e-3, "deep.1": 1e-5, "deep.2": 1e-5, "deep.3": 1e-5, "last": 1e-4}
    assert {key: layers[key].eps for key in eps} == eps
    momentum = {key: layers[key].momentum for key in eps if layers[key].hyperparameters_known}
    cumulative = {"deep.1": 0.25} if STATE[name] == "train" else {}
    assert momentum == {"bn": 0.03, "deep.2": 0.1, "deep.3": 0.1, "last": 0.1} | cumulative
    assert ("momentum is 0 in the graph of deep.1" in notes) == (STATE[name] != "train")
    # the InstanceNorm is told from BatchNorm as long as it is one operator
    assert ("deep.4" in layers) == (name == "decomposed") == ("1 layer (deep.4): no batch_norm" in notes)
    assert layers["deep.3"].running_mean is None


# ---- damaged and hostile archives


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught, open_checkpoint(path) as checkpoint:
        checkpoint.layers()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(
    source: Path, target: Path, change: Callable[[str, bytes], bytes | None], top: str | None = None
) -> Path:
    """A copy with other entries; None leaves one out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(f"{top or name.partition('/')[0]}/{name.partition('/')[2]}", content)
    return target


CONFIG = "data/weights/model_weights_config.json"
MEAN = "bn.running_mean"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"path_name": "../../eval.pt"}, "the numbers of bn.running_mean are missing"),
        ({"path_name": 5}, "the numbers of bn.running_mean are missing"),
        ({"tensor_meta": None}, "its tensors are not described"),
        ({"sizes": [{"as_int": 2**40}]}, "reaches beyond its storage"),
        ({"sizes": [{"as_int": -1}]}, "without a proper shape"),
        ({"storage_offset": {"as_int": 2**61}}, "reaches beyond its storage"),
        ({"strides": [{"as_int": 2**50}]}, "reaches beyond its storage"),
        ({"dtype": 8}, "reaches beyond its storage"),
        ({"use_pickle": True}, "a damaged file"),
    ],
)
def test_descriptions_that_lie_are_refused(
    corpus: Path, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    def lie(name: str, content: bytes) -> bytes:
        if name != CONFIG:
            return content
        said = json.loads(content)
        entry = said["config"][MEAN]
        for key, value in change.items():
            (entry if key in entry else entry["tensor_meta"])[key] = value
        return json.dumps(said).encode()

    assert expected in refusal(changed(corpus / "eval.pt2", tmp_path / "a.pt2", lie))


def test_a_graph_that_makes_no_sense_leaves_eps_unknown(corpus: Path, tmp_path: Path) -> None:
    for graph in (b"{}", b'{"graph_module": {"graph": {"nodes": [1, {}, {"target": "batch_norm"}]}}}'):
        path = changed(
            corpus / "eval.pt2",
            tmp_path / "a.pt2",
            lambda name, content, graph=graph: graph if name == "models/model.json" else content,  # type: ignore[misc]
        )
        with open_checkpoint(path) as checkpoint:
            layers = checkpoint.layers()
        assert [layer.name for layer in layers] == ["bn", "deep.1", "deep.2", "deep.4", "last"]
        assert all(layer.eps is None for layer in layers)


def test_packages_of_compiled_code_and_of_several_networks(corpus: Path, tmp_path: Path) -> None:
    def without_program(name: str, content: bytes) -> bytes | None:
        return None if name.startswith(("models/", "data/weights")) else content

    text = refusal(changed(corpus / "eval.pt2", tmp_path / "a.pt2", without_program))
    assert "without an exported program, as AOTInductor compiles it" in text
    with zipfile.ZipFile(tmp_path / "two.pt2", "w") as both:
        for name in ("eval", "train"):
            with zipfile.ZipFile(corpus / f"{name}.pt2") as archive:
                for entry in archive.namelist():
                    rest = entry.partition("/")[2]
                    if rest.startswith("data/weights/weight_") and name == "train":
                        rest = rest.replace("weight_", "other_")
                    content = archive.read(entry)
                    if rest == CONFIG and name == "train":
                        content = content.replace(b'"weight_', b'"other_')
                    if rest.endswith((".json", "weight", "archive_format")) or "/weights/" in rest:
                        rest = rest.replace("model.json", f"{name}.json").replace("model_w", f"{name}_w")
                        if f"two/{rest}" not in both.namelist():
                            both.writestr(f"two/{rest}", content)
    for name in ("eval", "train"):
        with open_checkpoint(tmp_path / "two.pt2", name) as checkpoint:
            expected = torch.load(corpus / f"{name}.pt", weights_only=True)
            assert [candidate.key for candidate in checkpoint.candidates] == ["eval", "train"]
            assert checkpoint.hyperparameters["deep.1"].momentum == (0.25 if name == "train" else None)
            for key, tensor in checkpoint.tensors.items():
                assert torch.equal(tensor.read(), expected[key])


def test_a_program_is_not_rewritten(corpus: Path, tmp_path: Path) -> None:
    for name in ("eval", "layout_2_8", "layout_2_7"):
        with pytest.raises(CheckpointError, match=r"a program of torch\.export, which is only read"):
            rewrite(corpus / f"{name}.pt2", tmp_path / "a.pt2", {"bn.running_mean": torch.zeros(4)})
    assert not (tmp_path / "a.pt2").exists()


def test_a_program_of_an_early_version_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.json", "{}")
    assert "a program of torch.export of an early version" in refusal(tmp_path / "a.pt2")


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["eval", "layout_2_8", "layout_2_7"])
def test_damage_is_said_in_one_line(corpus: Path, tmp_path: Path, name: str, count: int) -> None:
    assert mutations(tmp_path, corpus / f"{name}.pt2", count) > 0
