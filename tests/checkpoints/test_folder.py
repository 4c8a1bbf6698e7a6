"""Which files of a directory are read: its own, and those of the cache that it belongs to."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torch import nn

from bncli.checkpoints import open_checkpoint
from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.folder import Folder
from bncli.errors import CheckpointError


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A directory of torch.distributed.checkpoint as the cache of a hub keeps it: links into `blobs`."""
    own = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(nn.Sequential(nn.BatchNorm1d(3)).state_dict(), checkpoint_id=blobs, no_dist=True)
    own.mkdir(parents=True)
    for path in blobs.iterdir():
        (own / path.name).symlink_to(f"../../blobs/{path.name}")
    return own


def refusal(source: Path) -> str:
    with pytest.raises(CheckpointError) as caught, open_checkpoint(source):
        pass
    return str(caught.value)


def test_a_snapshot_of_a_hub_is_read_through_its_links(snapshot: Path) -> None:
    with open_checkpoint(snapshot) as checkpoint:
        assert [layer.num_features for layer in checkpoint.layers()] == [3]


def test_a_link_out_of_the_cache_is_not_followed_and_named(snapshot: Path, tmp_path: Path) -> None:
    shard = snapshot / "__0_0.distcp"
    (tmp_path / "secret").write_bytes(shard.read_bytes())
    shard.unlink()
    for target in ("../../../secret", str(tmp_path / "secret"), "../../blobs/../../secret"):
        shard.symlink_to(target)
        with (
            open_checkpoint(snapshot) as checkpoint,
            pytest.raises(CheckpointError, match="is a link that leads elsewhere; bncli follows none"),
        ):
            checkpoint.layers()
        shard.unlink()
    # one behind another
    (snapshot.parents[1] / "blobs" / "hop").symlink_to("../../secret")
    shard.symlink_to("../../blobs/hop")
    with open_checkpoint(snapshot) as checkpoint, pytest.raises(CheckpointError, match="leads elsewhere"):
        checkpoint.layers()


def test_a_folder_called_blobs_that_is_a_link_itself_is_none_of_the_cache(
    snapshot: Path, tmp_path: Path
) -> None:
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert "; 2 links in it not followed, such as .metadata, which leads elsewhere" in refusal(snapshot)


def test_links_within_a_directory_are_followed_and_folders_are_not(tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "file").write_bytes(b"12345")
    (tmp_path / "a" / "link").symlink_to("deep/file")
    (tmp_path / "a" / "folder").symlink_to("deep")
    (tmp_path / "a" / "broken").symlink_to("nothing")
    (tmp_path / "a" / "loop").symlink_to("loop")
    with ExitStack() as stack:
        folder = Folder(tmp_path / "a", stack)
        assert folder.names == {"deep/file", "link"}
        assert folder.read("link") == b"12345"
        assert folder.left_out.startswith("; 3 links in it not followed, such as broken,")
        for name in ("folder", "broken", "folder/file", "../a/link"):
            with pytest.raises(UnreadableFileError):
                folder.read(name)
