"""An index of shards names files: those beside it are opened, no others."""

import json
import os
import zipfile
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch
from torch import nn

from bncli.batchnorm import read_running_stats
from bncli.checkpoints import any_content, open_checkpoint
from bncli.checkpoints.formats.shard_index import place_beside
from bncli.errors import CheckpointError

OUTSIDE = [
    "../model", "/etc/hostname", "a/b", "a/../../model", "..", ".", "...", "", "~", "~root/model", "a\\b",
    "s3://bucket/x", "https://elsewhere.example/x", "memory://other/model", "file:///etc/hostname",
    "//elsewhere.example/x", "zip://a::memory://other/x", "simplecache::x", "model?host=elsewhere", "model#x",
    "%2e%2e%2fmodel", "model*", "x\0y", "x\ny", "x\u202ey",
]  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    model(torch.randn(8, 3, 5, 5))
    return model


def write_index(place: str, weight_map: dict[str, object]) -> str:
    with fsspec.open(f"{place}/model.safetensors.index.json", "wt") as file:
        json.dump({"metadata": {}, "weight_map": weight_map}, file)
    return f"{place}/model.safetensors.index.json"


def write_shard(path: str, state: dict[str, torch.Tensor]) -> None:
    with fsspec.open(path, "wb") as file:
        file.write(safetensors.torch.save(state))


def assert_read(index: str | Path) -> None:
    with open_checkpoint(index) as checkpoint:
        (found,) = checkpoint.layers()
    (expected,) = read_running_stats(network())
    assert torch.equal(found.running_mean, expected.running_mean)
    assert torch.equal(found.running_var, expected.running_var)


@pytest.mark.parametrize("place", ["directory", "file URL", "memory URL"])
def test_shards_beside_their_index_are_read(tmp_path: Path, place: str) -> None:
    base = {"directory": str(tmp_path), "file URL": f"file://{tmp_path}", "memory URL": "memory://bucket/run"}
    state = network().state_dict()
    halves = dict(list(state.items())[:3]), dict(list(state.items())[3:])
    weight_map: dict[str, object] = {}
    for number, half in enumerate(halves):
        name = f"model-0000{number}-of-00002 (copy)+v1.0=x@y.safetensors"  # as plain as names get
        write_shard(f"{base[place]}/{name}", half)
        weight_map |= dict.fromkeys(half, name)
    assert_read(write_index(base[place], weight_map))


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("place", ["directory", "memory URL"])
def test_an_entry_that_leads_elsewhere_is_named_and_nothing_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    base = str(tmp_path / "deep") if place == "directory" else "memory://bucket/deep"
    (tmp_path / "deep").mkdir()
    state = network().state_dict()
    for outside in (f"{tmp_path}/model", "memory://bucket/model", "memory://other/model"):
        write_shard(outside, state)
    write_shard(f"{base}/sound", state)
    # a sound entry comes first: not even that one is opened
    index = write_index(base, {**dict.fromkeys(state, "sound"), "1.running_mean": name})
    opened: list[str] = []
    genuine = any_content.open_source
    monkeypatch.setattr(any_content, "open_source", lambda path: opened.append(path) or genuine(path))
    with pytest.raises(CheckpointError) as caught, open_checkpoint(index):
        pass
    message = str(caught.value)
    assert message.startswith(
        f"{index}: its index names {name!r} for tensor '1.running_mean', which is no plain"
    )
    assert "\n" not in message
    assert opened == [index]


def test_links_that_the_user_made_are_followed_from_where_they_lie(tmp_path: Path) -> None:
    """The cache of a hub is made of them: snapshots/REVISION/NAME leads to blobs/DIGEST."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    state = network().state_dict()
    write_shard(f"{blobs}/1a", state)
    Path(write_index(str(blobs), dict.fromkeys(state, "model-1.safetensors"))).rename(blobs / "2b")
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/1a")
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/2b")
    assert_read(snapshot / "model.safetensors.index.json")


def test_a_link_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    """As a stranger's archive may hold it."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    state = network().state_dict()
    write_shard(f"{outside}/secret", state)
    (inside / "model-1.safetensors").symlink_to(outside / "secret")
    index = write_index(str(inside), dict.fromkeys(state, "model-1.safetensors"))
    with pytest.raises(CheckpointError, match="is a link that leads elsewhere; bncli follows none"):
        open_checkpoint(index).__enter__()


def test_a_link_to_a_pipe_or_a_directory_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, target, expected in (("a", "pipe", "neither a file nor a URL"), ("b", ".", "a directory")):
        (tmp_path / name).symlink_to(target)
        index = write_index(str(tmp_path), {"1.running_mean": name})
        with pytest.raises(CheckpointError, match=expected) as caught, open_checkpoint(index):
            pass
        assert str(caught.value).startswith(f"{tmp_path}/{name}: ")


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("model.index.json", "SHARD"),
        ("./a/model.index.json", "./a/SHARD"),
        ("/a/model.index.json", "/a/SHARD"),
        ("s3://bucket/a/model.index.json", "s3://bucket/a/SHARD"),
        ("https://host/a/model.index.json?download=true&next=b/c", "https://host/a/SHARD"),
        ("https://host/a/model.index.json#b/c", "https://host/a/SHARD"),
        ("simplecache::https://host/a/model.index.json", "simplecache::https://host/a/SHARD"),
        ("zip://model.index.json::s3://bucket/a.zip", "zip://SHARD::s3://bucket/a.zip"),
        ("zip://a/model.index.json::simplecache::s3://b/a.zip", "zip://a/SHARD::simplecache::s3://b/a.zip"),
    ],
)
def test_a_shard_is_looked_for_in_the_folder_of_its_index(index: str, expected: str) -> None:
    assert place_beside(index, "SHARD") == expected


def test_an_index_in_an_archive_at_a_url_finds_its_shards_in_that_archive(tmp_path: Path) -> None:
    state = network().state_dict()
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("a/model-1.safetensors", safetensors.torch.save(state))
        weight_map = dict.fromkeys(state, "model-1.safetensors")
        archive.writestr("a/model.index.json", json.dumps({"weight_map": weight_map}))
    assert_read(f"zip://a/model.index.json::file://{tmp_path}/model.zip")
