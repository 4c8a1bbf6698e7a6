"""Directories of torch.distributed.checkpoint, against what torch itself joins of them.

The files are made by two real ranks, by tests/frameworks/make_distributed.py.
"""

import importlib.util
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.metadata import Metadata

from bncli import load_weights
from bncli.batchnorm import compare, compare_ranks
from bncli.checkpoints import open_checkpoint
from bncli.checkpoints.formats import distributed_folder
from bncli.checkpoints.rewrite import rewrite
from bncli.errors import CheckpointError
from tests.checkpoints.formats.damage import mutations
from tests.frameworks.recorded import FILES

STATISTICS = ("running_mean", "running_var")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    with zipfile.ZipFile(FILES / "distributed" / "files.zip") as archive:
        archive.extractall(folder)
    return folder


def joined(path: Path, *keys: str) -> dict[str, Tensor]:
    """What torch joined."""
    content = torch.load(path, weights_only=True)
    for key in keys:
        content = content[key]
    return dict(content)


def read_all(source: Path) -> dict[str, Tensor]:
    with open_checkpoint(source) as checkpoint:
        return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


@pytest.mark.parametrize(
    ("name", "keys", "whole"),
    [
        ("ddp", ("model",), "ddp.pt"),
        ("ddp_files", ("app", "model"), "ddp_files.pt"),  # of a file for each tensor
        ("fsdp2", ("model",), "fsdp2.pt"),
        ("fsdp2_safetensors", ("model",), "fsdp2.pt"),
        ("cut", (), "cut.pt"),  # along the second dimension
    ],
)
def test_every_tensor_is_what_torch_joins(corpus: Path, name: str, keys: tuple[str, ...], whole: str) -> None:
    expected = joined(corpus / whole, *keys)
    expected = {key.removeprefix("module."): tensor for key, tensor in expected.items()}
    found = read_all(corpus / name)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def test_layers_come_in_the_order_of_the_network_not_of_the_ranks(corpus: Path) -> None:
    with open_checkpoint(corpus / "ddp") as checkpoint:
        assert [layer.name for layer in checkpoint.layers()] == ["1", "3", "6"]
        assert (checkpoint.kind, checkpoint.key) == ("torch distributed", "model")
        saved = torch.load(corpus / "rank0.pt", weights_only=True)
        assert list(checkpoint.tensors) == [name.removeprefix("module.") for name in saved]


def test_ranks_that_were_mixed_are_named_layer_by_layer(corpus: Path) -> None:
    ranks = [torch.load(corpus / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    with open_checkpoint(corpus / "ddp") as checkpoint:
        (note,) = checkpoint.notes
        origin = {
            layer.name: [
                rank
                for leaf in ("running_mean", "running_var")
                for rank in range(2)
                if torch.equal(getattr(layer, leaf), ranks[rank][f"module.{layer.name}.{leaf}"])
            ]
            for layer in checkpoint.layers()
        }
    # the second layer's mean is the same on both ranks: its input is normalised on each
    assert origin == {"1": [1, 1], "3": [0, 1, 0], "6": [1, 1]}
    assert "different ranks: of rank 1 in 1, 6; mean of rank 1, variance of 0 in 3. What" in note
    with open_checkpoint(corpus / "fsdp2") as checkpoint:
        assert checkpoint.notes == ()  # all of rank 1


def test_networks_of_ranks_that_wrote_apart_can_be_compared(corpus: Path) -> None:
    found = []
    for rank in range(2):
        with open_checkpoint(corpus / "ddp_each", f"rank{rank}.model") as checkpoint:
            found.append(checkpoint)
            state = torch.load(corpus / f"rank{rank}.pt", weights_only=True)
            for layer in checkpoint.layers():
                assert torch.equal(layer.running_var, state[f"module.{layer.name}.running_var"])
    with (
        open_checkpoint(corpus / "ddp_each", "rank0.model") as one,
        open_checkpoint(corpus / "ddp_each", "rank1.model") as two,
    ):
        pool = compare_ranks([one, two])
    assert (pool.identical, pool.other_differences) == (False, ())


def test_a_directory_is_compared_and_loaded_like_a_file(corpus: Path) -> None:
    with open_checkpoint(corpus / "fsdp2") as one, open_checkpoint(corpus / "fsdp2.pt") as two:
        assert compare(one, two).identical
    # full_state_dict=True gives rank 0's statistics, the directory has those of the rank that wrote them
    with open_checkpoint(corpus / "fsdp2") as one, open_checkpoint(corpus / "fsdp2_whole.pt") as two:
        found = compare(one, two)
    assert all(layer.statistics_moved and not layer.weights_moved for layer in found.layers)
    model = nn.Sequential(nn.Conv2d(2, 5, 2), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3),
                          nn.Flatten(), nn.Linear(27, 4), nn.BatchNorm1d(4, affine=False))  # fmt: skip
    loaded = load_weights(model, corpus / "fsdp2")
    assert loaded.num_loaded == loaded.num_tensors
    for name, tensor in joined(corpus / "fsdp2.pt", "model").items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_what_one_process_saves_is_read_in_every_type_and_layout(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    types = (torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool)
    state: dict[str, Any] = {f"type{index}": torch.arange(5).to(dtype) for index, dtype in enumerate(types)}
    base = torch.randn(4, 6, 3, 3, generator=generator)
    state |= {
        "view": base[1:3, ::2],
        "transposed": base.permute(1, 0, 3, 2),
        "channels_last": base.to(memory_format=torch.channels_last),
        "none": torch.zeros(0, 3),
        "number": torch.tensor(2.5),
        "with.dots/and slashes": {"deep": [base[0], {"deeper": base[1]}]},
        "1.running_mean": torch.ones(3),
        "1.running_var": torch.ones(3),
    }
    with pytest.warns(UserWarning, match="save in a single process"):
        dcp.save(state, checkpoint_id=tmp_path / "a", no_dist=True)
    found = read_all(tmp_path / "a")
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def compressed_folder(state: dict[str, Tensor], path: Path) -> Path:
    writer = dcp.FileSystemWriter(path, _extensions=[ZStandard()])
    with pytest.warns(UserWarning, match="save in a single process"):
        dcp.save(state, storage_writer=writer, no_dist=True)
    return path


def test_shards_that_torch_compressed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {"conv.weight": torch.randn(8, 4, 3, 3, generator=generator), "1.running_mean": torch.ones(500),
             "1.running_var": torch.rand(500, generator=generator)}  # fmt: skip
    folder = compressed_folder(state, tmp_path / "a")
    files = [file for file in folder.iterdir() if file.suffix == ".distcp"]
    assert all(b"archive/data" not in file.read_bytes() for file in files)  # no zip archive of torch.save
    found = read_all(folder)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "zstandard" else find(name))
    assert 'compressed by zstd; to read it: pip install "bncli[jax]"' in refusal(folder)


# ---- damaged and hostile directories


def test_a_compressed_shard_expands_to_no_more_than_its_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zstandard

    folder = compressed_folder({f"1.{leaf}": torch.ones(500) for leaf in STATISTICS}, tmp_path / "a")
    bomb = zstandard.ZstdCompressor().compress(bytes(2**28))
    (shard,) = folder.glob("*.distcp")
    shard.write_bytes(bomb * 2)

    def lead_there(content: Metadata) -> None:
        for index, place in enumerate(content.storage_data.values()):
            place.offset, place.length = index * len(bomb), len(bomb)

    changed_metadata(folder, lead_there)
    assert "compressed data of more than 67,536 bytes" in refusal(folder)
    monkeypatch.setattr(distributed_folder, "MAX_READ", 67_535)
    assert "a compressed piece of more than 67,535 bytes, which bncli does not expand" in refusal(folder)


def refusal(source: Path) -> str:
    with pytest.raises(CheckpointError) as caught, open_checkpoint(source) as checkpoint:
        checkpoint.layers()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def copied(corpus: Path, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus / name, tmp_path / name))


def changed_metadata(folder: Path, change: Any) -> None:
    path = folder / ".metadata"
    content: Metadata = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))


def test_a_missing_shard_and_one_elsewhere_are_refused(corpus: Path, tmp_path: Path) -> None:
    folder = copied(corpus, "ddp", tmp_path)
    (folder / "__1_0.distcp").rename(tmp_path / "elsewhere")
    assert "there is no file __1_0.distcp in the directory" in refusal(folder)
    (folder / "__1_0.distcp").symlink_to(tmp_path / "elsewhere")
    assert "__1_0.distcp is a link that leads elsewhere; bncli follows none" in refusal(folder)

    def lead_out(content: Metadata) -> None:
        for place in content.storage_data.values():
            place.relative_path = f"../{place.relative_path}"

    changed_metadata(folder, lead_out)
    assert "there is no file ../__" in refusal(folder)


def test_pieces_that_do_not_make_up_their_tensor_are_refused(corpus: Path, tmp_path: Path) -> None:
    folder = copied(corpus, "cut", tmp_path)
    name = "1.running_mean"

    def larger(content: Metadata) -> None:
        content.state_dict_metadata[name].size = torch.Size([2**40])

    def beyond(content: Metadata) -> None:
        content.state_dict_metadata[name].chunks[0].sizes = torch.Size([2**40])

    def nowhere(content: Metadata) -> None:
        content.state_dict_metadata[name].chunks[0].offsets = torch.Size([1])

    def swapped(content: Metadata) -> None:
        stored = content.storage_data
        first, second = [key for key in stored if key.fqn == name]
        stored[first], stored[second] = stored[second], stored[first]

    def long(content: Metadata) -> None:
        for place in content.storage_data.values():
            place.offset += 2**40

    def shared(content: Metadata) -> None:
        places = list(content.storage_data.values())
        places[0].offset, places[0].relative_path = places[1].offset + 1, places[1].relative_path

    def packed(content: Metadata) -> None:
        for place in content.storage_data.values():
            place.transform_descriptors = ["stream.zstd/1"]

    def sealed(content: Metadata) -> None:
        for place in content.storage_data.values():
            place.transform_descriptors = ["stream.seal/1", "stream.zstd/1"]

    def empty(content: Metadata) -> None:
        content.storage_data = None

    original = (folder / ".metadata").read_bytes()
    for change, expected in (
        (larger, "do not make it up"),
        (beyond, "do not make it up"),
        (nowhere, "does not say where 1.running_mean lies"),
        (swapped, "a piece of a tensor has another shape or type"),
        (long, "ends before what it holds"),
        (shared, "pieces in __"),
        (packed, "what is compressed in it does not decompress"),
        (sealed, "an extension of torch.distributed.checkpoint that bncli does not know (['stream.seal/1'"),
        (empty, "is no metadata"),
    ):
        (folder / ".metadata").write_bytes(original)
        changed_metadata(folder, change)
        assert expected in refusal(folder), change


def test_pieces_that_overlap_are_refused_when_they_are_read(corpus: Path, tmp_path: Path) -> None:
    folder = copied(corpus, "cut", tmp_path)

    def overlap(content: Metadata) -> None:
        entry = content.state_dict_metadata["1.running_mean"]
        sizes = [tuple(chunk.sizes) for chunk in entry.chunks]
        assert sizes == [(3,), (2,)]
        (key,) = [key for key in content.storage_data if key.fqn == "1.running_mean" and key.offset[0] == 3]
        place = content.storage_data.pop(key)
        entry.chunks[1].offsets = torch.Size([2])
        content.storage_data[type(key)(key.fqn, [2])] = place

    changed_metadata(folder, overlap)
    assert "overlap" in refusal(folder)


def test_a_pickle_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harmed",)

    (tmp_path / "a" / ".metadata").write_bytes(pickle.dumps(Harm()))
    assert "has no Metadata of torch.distributed.checkpoint" in refusal(tmp_path / "a")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["cut", "ddp_each", "fsdp2_safetensors"])
def test_damage_is_said_in_one_line(corpus: Path, tmp_path: Path, name: str, count: int) -> None:
    assert mutations(tmp_path, corpus / name, count) > 0


def test_a_directory_is_not_rewritten_and_it_is_said_what_joins_it(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="dcp_to_torch_save"):
        rewrite(corpus / "ddp", tmp_path / "a.pt", {"model.module.1.running_mean": torch.zeros(5)})
