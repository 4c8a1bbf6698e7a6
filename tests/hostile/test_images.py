"""Images and caches made to harm: bombs, disguises, pipes, names, planted cache files."""

import io
import json
import os
import pickle
import re
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bncli.config import ImageFolderConfig
from bncli.data.decode import read_image
from bncli.data.imagefolder import load_image_folder
from bncli.errors import DataError
from tests.conftest import Bncli


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(b"\0" * min((3 * width + 1) * height, 4096))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def text_bomb() -> bytes:
    return png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200 << 20))))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(30_000, 30_000), "decompression bomb"),
        (png(2**31 - 1, 2**31 - 1), "not a readable image"),
        (text_bomb, "not a readable image"),
        (saved("GIF"), "no PNG, JPEG or WebP"),
        (saved("TIFF"), "no PNG, JPEG or WebP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no PNG, JPEG or WebP"),
        (png(8, 8)[:-30], "not a readable image"),
    ],
    ids=["bomb", "overflow", "text bomb", "gif", "tiff", "postscript", "truncated"],
)
def test_a_hostile_image_is_named_and_the_next_is_answered(
    bncli: Bncli, smallest_run: Path, tmp_path: Path, content: bytes | Callable[[], bytes], expected: str
) -> None:
    (tmp_path / "evil.png").write_bytes(content if isinstance(content, bytes) else content())
    (tmp_path / "good.png").write_bytes(png(8, 8))
    outcome = bncli("predict", smallest_run / "last.pt", tmp_path / "evil.png", tmp_path / "good.png")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert expected in outcome.err
    assert "good.png: " in outcome.out


def test_pipes_devices_and_loops_are_named_without_waiting(
    bncli: Bncli, smallest_run: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    paths = [tmp_path / "pipe.png", tmp_path / "loop.png", "/dev/zero", "a\0b.png"]
    outcome = bncli("predict", smallest_run / "last.pt", *paths)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == len(paths)
    assert outcome.err.count("a pipe or a device") == 2


def test_a_file_too_large_for_an_image_is_not_read_whole(
    bncli: Bncli, smallest_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bncli.data.decode.MAX_FILE_BYTES", 1 << 20)
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no space
    outcome = bncli("predict", smallest_run / "last.pt", tmp_path / "large.png")
    assert outcome.code == 2
    assert "larger than 1 MiB" in outcome.err


def test_names_of_files_cannot_steer_the_terminal(bncli: Bncli, smallest_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"\x1b[2J.png", b"a\nb.png", b"[bold]c.png", b"\xff\xfe.png", b"\x9b\x07.png"):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_bytes(png(8, 8))
        Path(os.fsdecode(bytes(folder) + b"/broken" + name)).write_bytes(b"no image")
    for json_option in ([], ["--json"]):
        outcome = bncli("predict", smallest_run / "last.pt", folder, *json_option)
        assert outcome.code == 2
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", outcome.out + outcome.err)
        assert len(outcome.err.splitlines()) == 5
    assert len(outcome.json["predictions"]) == 5


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        for label, name in enumerate(("a", "b\x1b[31m")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (label * 200, number * 20, 9)).save(folder / f"{number}.png")
    return tmp_path / "images"


def test_a_class_folder_may_be_called_anything(bncli: Bncli, images: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        f"data: {{name: imagefolder, root: {images}, image_size: 8, cache: {tmp_path}/cache}}\n"
        "model: {widths: [2], blocks_per_stage: 1}\ntrain: {epochs: 1, batch_size: 4}\n"
    )
    for command in (
        ("train", tmp_path / "c.yaml", "--dry-run"),
        ("train", tmp_path / "c.yaml", "--run-dir", tmp_path / "run\x1b[1m"),
        ("eval", tmp_path / "run\x1b[1m" / "last.pt", "--num-images", 2, "--batch-sizes", "2"),
    ):
        outcome = bncli(*command)
        assert outcome.code == 0, outcome.err
        assert "\x1b" not in outcome.out + outcome.err, command


def load(images: Path) -> torch.Tensor:
    """The training images, whose cache has one entry and one pointer."""
    config = ImageFolderConfig(root=str(images), image_size=8, cache=str(images.parent / "cache"))
    return load_image_folder(config, only_train=True).train.images


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("hostile-was-here",))


@pytest.mark.parametrize("target", ["*.npy", "*.json"])
@pytest.mark.parametrize(
    "how", ["object", "pickle", "npz", "header", "deep", "empty", "cut", "pipe", "elsewhere"]
)
def test_a_planted_cache_file_is_made_again_and_never_executed(
    images: Path, monkeypatch: pytest.MonkeyPatch, target: str, how: str
) -> None:
    monkeypatch.chdir(images.parent)
    expected = load(images).clone()
    (path,) = (images.parent / "cache").glob(target)
    file = io.BytesIO()
    if how == "object":
        np.save(file, np.array([Hostile()], dtype=object), allow_pickle=True)
    elif how == "pickle":
        pickle.dump(Hostile(), file)
    elif how == "npz":
        np.savez(file, x=np.zeros(3))
    elif how == "header":
        file.write(b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000)
    elif how == "deep":
        file.write(b"[" * 4096)
    elif how == "cut":
        file.write(path.read_bytes()[:-10])
    elif how == "elsewhere":
        manifest = json.loads(next((images.parent / "cache").glob("*.json")).read_text())["manifest"]
        file.write(json.dumps({"manifest": manifest, "content": "../images"}).encode())
    path.unlink()
    os.mkfifo(path) if how == "pipe" else path.write_bytes(file.getvalue())
    assert torch.equal(load(images), expected)
    assert not (images.parent / "hostile-was-here").exists()


def test_what_no_run_used_for_long_is_removed_when_another_entry_is_written(images: Path) -> None:
    cache = images.parent / "cache"
    load(images)
    (first,) = cache.glob("*.npy")
    other = cache / "mine.npy"
    other.write_bytes(b"not of bncli")
    long_ago = time.time() - 100 * 24 * 3600
    for path in cache.iterdir():
        os.utime(path, (long_ago, long_ago))
    load(images)  # a use counts
    Image.new("RGB", (8, 8)).save(images / "train" / "a" / "new.png")
    load(images)
    assert first.exists()
    for path in cache.iterdir():
        os.utime(path, (long_ago, long_ago))
    Image.new("RGB", (8, 8), "red").save(images / "train" / "a" / "newer.png")
    load(images)
    assert not first.exists()
    assert other.exists()
    assert len(list(cache.glob("*.npy"))) == 2


def test_an_address_other_than_http_is_refused(tmp_path: Path) -> None:
    from bncli.config import Cifar10Config
    from bncli.data.cifar10 import load_cifar10

    for url in ("file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"):
        with pytest.raises(DataError, match="must begin with http"):
            load_cifar10(Cifar10Config(root=str(tmp_path), url=url))


def test_an_image_just_over_the_limit_is_refused_whatever_the_filters_of_warnings_say() -> None:
    """PIL itself refuses twice as many pixels, and only warns of these 120 million."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="decompression bomb"):
            read_image(png(12_000, 10_000), 8)


@pytest.mark.parametrize("how", ["shape", "order"])
def test_a_cache_entry_of_another_shape_or_order_is_made_again(images: Path, how: str) -> None:
    expected = load(images).clone()
    (path,) = (images.parent / "cache").glob("*.npy")
    whole = np.load(path)
    np.save(path, np.zeros((1, *whole.shape), np.uint8) if how == "shape" else np.asfortranarray(whole * 0))
    assert torch.equal(load(images), expected)


def test_a_cache_pointer_leads_to_no_file_outside(images: Path) -> None:
    expected = load(images).clone()
    cache = images.parent / "cache"
    (entry,), (pointer,) = cache.glob("*.npy"), cache.glob("*.json")
    np.save(cache.parent / "planted.npy", np.load(entry) * 0)
    pointer.write_text(json.dumps(json.loads(pointer.read_text()) | {"content": "../planted"}))
    assert torch.equal(load(images), expected)
