import hashlib
import io
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bncli.config import Cifar10Config, ImageFolderConfig
from bncli.data import for_training, imagecache, load_dataset
from bncli.data.imagefolder import EXTENSIONS
from bncli.errors import DataError
from bncli.indexed import NO_LABEL
from bncli.torchvision_compat import import_torchvision

HASHED = ["hash train images", "hash test images"]
MADE = ["hash train images", "decode train images", "hash test images", "decode test images"]


class Folder:
    """An image folder of 2 splits x 2 classes x 3 random 32x32 PNGs."""

    def __init__(self, base: Path) -> None:
        self.root, self.cache = base / "images", base / "cache"
        self.rng = np.random.default_rng(0)
        for split in ("train", "test"):
            for name in ("cat", "dog"):
                for i in range(3):
                    self.save(f"{split}/{name}/{i}.png", self.pixels(32, 32))

    def pixels(self, *size: int) -> np.ndarray:
        return self.rng.integers(0, 256, (*size, 3), dtype=np.uint8)

    def save(self, name: str, pixels: np.ndarray, **options: object) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **options)
        return path

    @property
    def config(self) -> ImageFolderConfig:
        return ImageFolderConfig(root=str(self.root), cache=str(self.cache))

    def load(self):
        """Load, and say which steps of MADE it took."""
        steps = []
        dataset = load_dataset(self.config, progress=lambda what, *_: steps.append(what))
        return dataset, steps

    def pointer(self, split: str) -> Path:
        """What the cache notes of a split."""
        name = hashlib.sha256(str((self.root / split).resolve()).encode()).hexdigest()
        (found,) = self.cache.glob(f"{name[:32]}-*.json")
        return found

    def entry(self, split: str) -> Path:
        """The pixels of a split."""
        return self.cache / f"{json.loads(self.pointer(split).read_bytes())['content']}.npy"

    def error(self) -> str:
        with pytest.raises(DataError) as caught:
            load_dataset(self.config)
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


def expected(folder: Folder, split: str) -> tuple[np.ndarray, list[int]]:
    """The oracle: torchvision's ImageFolder, with its loader."""
    reference = import_torchvision().datasets.ImageFolder(str(folder.root / split))
    images = np.stack([np.asarray(image) for image, _ in reference]).transpose(0, 3, 1, 2)
    return images, [label for _, label in reference]


def assert_equals_torchvision(folder: Folder, dataset) -> None:
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        images, labels = expected(folder, name)
        assert np.array_equal(split.images.numpy(), images)
        assert split.labels.tolist() == labels


def test_pngs_come_back_bit_for_bit_in_torchvisions_order(folder):
    folder.save("train/dog/deeper/a.PNG", folder.pixels(32, 32))
    folder.save("train/dog/Z.png", folder.pixels(32, 32))
    folder.save("train/cat/deep/er/b.webp", folder.pixels(32, 32), lossless=True)
    (folder.root / "train" / "cat" / "notes.txt").write_text("no image")
    dataset, _ = folder.load()
    assert dataset.class_names == ("cat", "dog")
    assert len(dataset.train) == 9
    assert_equals_torchvision(folder, dataset)


def test_the_second_load_opens_no_image_and_gives_the_same(folder, monkeypatch):
    first, steps = folder.load()
    assert steps == MADE
    monkeypatch.setattr(imagecache, "_read", None)
    second, steps = folder.load()
    assert steps == []
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.images, second.test.images)


def test_training_images_alone_leave_the_rest_untouched_and_are_not_decoded_twice(folder):
    """The test images are broken, and repaired later."""
    broken = {path: path.read_bytes() for path in folder.root.glob("test/*/*")}
    for path in broken:
        path.write_bytes(b"")
    alone = load_dataset(folder.config, only_train=True)
    images, labels = expected(folder, "train")
    assert np.array_equal(alone.train.images.numpy(), images)
    assert alone.train.labels.tolist() == labels
    assert alone.test is alone.train
    for path, content in broken.items():
        path.write_bytes(content)
    dataset, steps = folder.load()
    assert steps == MADE[2:]
    assert_equals_torchvision(folder, dataset)


def test_progress_ends_at_the_number_of_images(folder, monkeypatch):
    monkeypatch.setattr(imagecache, "_CHUNK", 5)
    calls = []
    load_dataset(folder.config, progress=lambda *call: calls.append(call))
    assert calls == [(what, *c) for what in MADE for c in [(5, 6), (6, 6)]]


def test_an_edited_image_is_noticed_even_with_its_old_size_and_time(folder):
    path = folder.root / "train" / "dog" / "1.png"
    black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    before = folder.save("train/dog/1.png", black, compress_level=0).stat()
    assert folder.load()[0].train.images[4].max() == 0
    folder.save("train/dog/1.png", white, compress_level=0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    dataset, steps = folder.load()
    assert dataset.train.images[4].min() == 255
    assert steps == MADE[:2]  # nothing changed in the other split


def test_touched_but_identical_images_are_not_decoded_again(folder):
    first, _ = folder.load()
    for path in folder.root.rglob("*.png"):
        path.touch()
    second, steps = folder.load()
    assert steps == HASHED
    assert torch.equal(first.train.images, second.train.images)
    assert folder.load()[1] == []


def test_a_moved_folder_is_not_decoded_again(folder, tmp_path):
    folder.load()
    folder.root = folder.root.rename(tmp_path / "elsewhere")
    assert folder.load()[1] == HASHED


def test_removed_renamed_and_added_images_are_noticed(folder):
    folder.load()
    (folder.root / "train" / "cat" / "0.png").unlink()
    (folder.root / "train" / "dog" / "0.png").rename(folder.root / "train" / "dog" / "9.png")
    folder.save("test/cat/7.png", folder.pixels(32, 32))
    dataset, _ = folder.load()
    assert_equals_torchvision(folder, dataset)


def test_each_image_size_has_its_own_cache_entry(folder):
    sizes = (32, 16, 32)
    configs = [folder.config.model_copy(update={"image_size": size}) for size in sizes]
    shapes = [load_dataset(config).train.images.shape for config in configs]
    assert [shape[2:] for shape in shapes] == [(32, 32), (16, 16), (32, 32)]


@pytest.mark.parametrize("damage", ["truncated", "emptied", "other shape", "other type", "an object", "zip"])
def test_a_damaged_cache_is_made_again(folder, damage):
    first, _ = folder.load()
    entry = folder.entry("train")
    content = entry.read_bytes()
    entry.unlink()  # `first` still maps the old file
    arrays = {"other shape": np.zeros((2, 3, 4, 4), np.uint8), "other type": np.zeros((6, 3, 32, 32))}
    if damage in arrays:
        np.save(entry, arrays[damage])
    elif damage == "an object":
        np.save(entry, np.array([{}], dtype=object), allow_pickle=True)
    elif damage == "zip":
        with entry.open("wb") as file:
            np.savez(file, a=np.zeros(3))
    else:
        entry.write_bytes(content[: -100 if damage == "truncated" else 0])
    second, steps = folder.load()
    assert steps == MADE[:2]
    assert torch.equal(first.train.images, second.train.images)
    assert folder.load()[1] == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"manifest": 1}', b"\xff"])
def test_a_damaged_manifest_is_made_again(folder, content):
    folder.load()
    pointer = folder.pointer("train")
    pointer.write_bytes(content)
    assert folder.load()[1] == ["hash train images"]
    assert set(json.loads(pointer.read_bytes())) == {"manifest", "content"}


def test_an_interrupted_run_leaves_no_entry_behind(folder, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(imagecache.os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.load()
    assert list(folder.cache.iterdir()) == []
    assert_equals_torchvision(folder, folder.load()[0])


def test_writing_to_the_tensor_changes_no_file(folder):
    first, _ = folder.load()
    kept = first.train.images.clone()
    first.train.images.zero_()
    assert torch.equal(folder.load()[0].train.images, kept)


def test_the_cache_is_in_the_users_cache_folder_by_default(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_dataset(ImageFolderConfig(root=str(folder.root)))
    assert list((tmp_path / "xdg" / "bncli").glob("*.npy"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert imagecache.default_cache() == tmp_path / "home" / ".cache" / "bncli"


def test_a_cache_that_cannot_be_written_is_named(folder):
    folder.cache.write_bytes(b"a file")
    message = folder.error()
    assert "data.cache" in message
    assert str(folder.cache) in message


@pytest.mark.parametrize(("which", "first_changed"), [("train", 6), ("test", 18)])
def test_a_file_that_changes_while_it_is_read_never_enters_the_cache(
    folder, monkeypatch, which, first_changed
):
    read = imagecache._read
    reads = iter(range(100))
    monkeypatch.setattr(imagecache, "_read", lambda path: read(path) + b"x" * (next(reads) >= first_changed))
    assert "changed while it was being read" in folder.error()
    assert len(list(folder.cache.iterdir())) == 2 * (which == "test")  # the training images


def broken(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("change", [broken, lambda _: b"", lambda _: b"no image", lambda c: c[:60] + c[70:]])
def test_a_broken_image_is_named(folder, change):
    path = folder.root / "test" / "cat" / "2.png"
    path.write_bytes(change(path.read_bytes()))
    assert f"{path}: not a readable image" in folder.error()
    assert set(folder.cache.iterdir()) == {folder.pointer("train"), folder.entry("train")}


@pytest.mark.parametrize("limit", [32 * 32 - 1, 32 * 32 // 2 - 1])  # warning; error from twice the limit
def test_a_decompression_bomb_is_named(folder, monkeypatch, limit):
    (folder.root / "train" / "cat" / "0.png").unlink()
    path = folder.save("train/cat/0.png", folder.pixels(32, 32))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    message = folder.error()
    assert f"{path}: not a readable image" in message
    assert "decompression bomb" in message


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_named(folder, split):
    (folder.root / split).rename(folder.root / "other")
    message = folder.error()
    assert f"{folder.root / split}: no such folder" in message
    assert "data.root" in message


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_other_names_of_the_test_split_are_taken(folder, name):
    (folder.root / "test").rename(folder.root / name)
    (folder.root / "test").mkdir()  # of images without labels, it holds no class folders
    Image.new("RGB", (4, 4)).save(folder.root / "test" / "unlabelled.png")
    dataset, _ = folder.load()
    images, labels = expected(folder, name)
    assert np.array_equal(dataset.test.images.numpy(), images)
    assert dataset.test.labels.tolist() == labels


def test_a_test_split_with_classes_comes_before_a_validation_split(folder):
    folder.save("val/cat/0.png", folder.pixels(4, 4))
    assert_equals_torchvision(folder, folder.load()[0])


def test_two_validation_splits_are_not_guessed_between(folder):
    (folder.root / "test").rename(folder.root / "val")
    folder.save("valid/cat/0.png", folder.pixels(4, 4))
    message = folder.error()
    assert "val and valid may each be the test split" in message
    assert "rename" in message


@pytest.mark.parametrize("split", ["train", "test", "val"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_root_that_names_a_split_means_the_folder_above(folder, monkeypatch, split, relative):
    if split == "val":
        (folder.root / "test").rename(folder.root / "val")
    first, _ = folder.load()
    if relative:
        monkeypatch.chdir(folder.root / split)
    root = "." if relative else str(folder.root / split)
    second = load_dataset(folder.config.model_copy(update={"root": root}))
    assert torch.equal(first.train.images, second.train.images)
    assert second.train.labels.tolist() == first.train.labels.tolist()


@pytest.mark.parametrize("place", ["..", "train/cat"])
def test_a_root_one_folder_off_is_told_the_right_one(folder, tmp_path, place):
    config = folder.config.model_copy(update={"root": str(folder.root / place)})
    with pytest.raises(DataError) as caught:
        load_dataset(config)
    if place == "..":
        assert str(caught.value).endswith(f"set data.root={folder.root / '..' / 'images'}")
    else:
        assert "holds no" in str(caught.value) or "no folders" in str(caught.value)
    (folder.root / "notes").mkdir()
    with pytest.raises(DataError, match=f"set data.root={folder.root}$"):
        load_dataset(folder.config.model_copy(update={"root": str(folder.root / "notes")}))


def test_what_lies_there_in_place_of_a_split_is_named(folder, tmp_path):
    (folder.root / "train").rename(folder.root / "Training")
    assert "rename Training to train" in folder.error()
    (folder.root / "Training").rename(folder.root / "train")
    (folder.root / "test").rename(folder.root / "Testing")
    assert "rename Testing to test" in folder.error()
    (folder.root / "Testing").rename(tmp_path / "away")
    assert f"into {folder.root}/test/CLASS" in folder.error()
    folder.root = folder.root / "train"
    folder.root = folder.root.rename(tmp_path / "unsplit")
    assert f"{folder.root} holds cat, dog: if these are the classes" in folder.error()
    folder.root = tmp_path / "nowhere"
    assert f"there is no folder {folder.root}" in folder.error()


def test_a_path_that_cannot_be_one_is_named(folder):
    for key, text in (("root", "~nobody-of-this-name"), ("cache", "~nobody-of-this-name"), ("root", "a\0b")):
        with pytest.raises(DataError, match=f"^data.{key}: "):
            load_dataset(folder.config.model_copy(update={key: text}))


def test_a_split_without_class_folders_is_named(folder):
    for path in (folder.root / "test").iterdir():
        path.rename(folder.root / path.name)
    assert f"{folder.root / 'test'}: no class folders" in folder.error()
    for name in ("a.png", "b.JPG"):
        (folder.root / "test" / name).touch()
    assert f"{folder.root / 'test'}: 2 images in it, but no class folders; expected" in folder.error()
    for path in (folder.root / "train").iterdir():
        path.rename(folder.root / f"{path.name}2")
    assert f"{folder.root / 'train'}: no class folders" in folder.error()


@pytest.mark.parametrize("stream", [False, True])
def test_images_without_class_folders_have_no_labels_and_are_both_splits(folder, stream):
    for path in sorted((folder.root / "train").rglob("*.png")):
        path.rename(folder.root / "train" / f"{path.parent.name}{path.name}")
    for name in ("cat", "dog"):
        (folder.root / "train" / name).rmdir()
    files = sorted((folder.root / "train").iterdir())
    files[-1].with_name("notes.txt").write_text("no image")
    pixels = np.stack([np.asarray(Image.open(file)) for file in map(io.BytesIO, map(Path.read_bytes, files))])
    dataset = load_dataset(folder.config.model_copy(update={"stream": stream, "workers": 0}))
    for split in (dataset.train, dataset.test):
        ((images, labels),) = split.batches_of([range(len(files))])
        assert np.array_equal(images.numpy(), pixels.transpose(0, 3, 1, 2))
        assert labels.tolist() == [NO_LABEL] * len(files)
        assert split.labels is None
    assert dataset.class_names == ()
    assert "no labels" in " ".join(dataset.notes)
    with pytest.raises(DataError, match="training needs labels"):
        for_training(dataset)


def test_that_streamed_images_have_no_labels_is_known_without_reading_them(folder, monkeypatch):
    folder.save("only/train/a.png", folder.pixels(32, 32))
    config = folder.config.model_copy(update={"root": str(folder.root / "only"), "stream": True})
    dataset = load_dataset(config)
    monkeypatch.setattr("bncli.data.decode.read_file", None)
    assert dataset.train.labels is None


def test_a_class_without_images_is_named(folder):
    (folder.root / "train" / "emu").mkdir()
    (folder.root / "train" / "emu" / "a.gif").write_bytes(b"")
    message = folder.error()
    assert f"{folder.root / 'train' / 'emu'}: no images" in message
    assert all(extension in message for extension in EXTENSIONS)


def test_classes_that_only_one_split_has_are_named(folder):
    folder.save("train/emu/0.png", folder.pixels(4, 4))
    folder.save("test/fox/0.png", folder.pixels(4, 4))
    message = folder.error()
    assert f"{folder.root / 'train'} has no folder fox" in message
    assert f"{folder.root / 'test'} has no folder emu" in message


def test_hidden_files_and_folders_are_skipped(folder):
    (folder.root / "train" / ".ipynb_checkpoints").mkdir()
    (folder.root / "train" / "cat" / "._0.png").write_bytes(b"AppleDouble")
    assert len(folder.load()[0].train) == 6


def test_a_link_to_a_folder_above_does_not_loop(folder):
    (folder.root / "train" / "cat" / "loop").symlink_to(folder.root / "train" / "cat")
    assert len(folder.load()[0].train) == 6


@pytest.mark.slow
def test_the_60000_real_images_as_pngs_give_the_same_tensors_and_then_start_in_a_second(
    real_cifar10, tmp_path
):
    real = load_dataset(Cifar10Config(root=str(real_cifar10)))
    root = tmp_path / "images"
    for name, split in (("train", real.train), ("test", real.test)):
        for class_name in real.class_names:
            (root / name / class_name).mkdir(parents=True)
        pixels = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        for i, label in enumerate(split.labels.tolist()):
            path = root / name / real.class_names[label] / f"{i:05}.png"
            Image.fromarray(pixels[i]).save(path, compress_level=1)
    config = ImageFolderConfig(root=str(root), cache=str(tmp_path / "cache"))
    first = load_dataset(config)
    assert first.class_names == real.class_names  # CIFAR-10's names happen to be sorted
    for ours, theirs in ((first.train, real.train), (first.test, real.test)):
        order = torch.argsort(theirs.labels, stable=True)
        assert torch.equal(ours.images, theirs.images[order])
        assert torch.equal(ours.labels, theirs.labels[order])
    start = time.perf_counter()
    load_dataset(config)
    seconds = time.perf_counter() - start
    print(f"second load: {seconds:.2f} s")
    assert seconds < 1.0
