"""The order of a network's outputs, from the files that people have."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bncli.config import ImageFolderConfig, NamedDataConfig
from bncli.data import load_dataset, sequential_batches
from bncli.data.class_order import read_class_order
from bncli.errors import DataError

NAMES = ["eel", "cat", "emu", "dog"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two of the four classes: cat, then dog."""
    for split in ("train", "test"):
        for name, value in (("cat", 10), ("dog", 20)):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(
                    tmp_path / split / name / f"{number}.png"
                )
    return tmp_path


def config(root: Path, content: str, **keys: object) -> ImageFolderConfig:
    (root / "classes.txt").write_text(content)
    keys = {"image_size": 8, "cache": str(root / "cache"), "workers": 0, **keys}
    return ImageFolderConfig(root=str(root), classes=str(root / "classes.txt"), **keys)


@pytest.mark.parametrize(
    "content",
    [
        "eel\ncat\n\nemu\r\ndog\n",
        json.dumps(NAMES),
        json.dumps({"cat": 1, "dog": 3, "eel": 0, "emu": 2}),
        json.dumps({"1": "cat", "0": "eel", "3": "dog", "2": "emu"}),
        json.dumps({"0": ["eel"], "1": ["n01", "cat"], "2": ["emu"], "3": ["dog", "n03"]}),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_folders_get_the_indices_of_the_network(root, content, stream):
    dataset = load_dataset(config(root, content, stream=stream))
    assert dataset.train.labels.tolist() == [1, 1, 3, 3]
    assert len(dataset.class_names) == 4
    assert "cat" in dataset.class_names[1]
    for split in (dataset.train, dataset.test):
        ((images, labels),) = sequential_batches(split, 9)
        assert torch.equal(labels, torch.tensor([1, 1, 3, 3]))
        assert images[:, 0, 0, 0].tolist() == [10, 10, 20, 20]


def test_names_that_two_classes_share_are_told_apart_by_their_other_names(tmp_path):
    """ImageNet's real file has two cranes."""
    (tmp_path / "c.json").write_text(json.dumps({"0": ["n1", "crane"], "1": ["n2", "crane"]}))
    order = read_class_order(str(tmp_path / "c.json"))
    assert order.indices_of(["n2", "n1"]) == [1, 0]
    assert order.names == ("n1, crane", "n2, crane")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("eel\ndogs\ncat", "does not name dog; the nearest to dog: dogs"),
        ("cat\ndog\ncat", "cat stands for 0 and for 2"),
        ('{"cat": 0, "dog": 0}', "cat and dog are both class 0"),
        ('{"0": ["cat", "dog"]}', "cat and dog are both class 0"),
        ('{"cat": 0, "dog": 2}', "dog has the index 2, but the 2 classes have 0 to 1"),
        ('{"cat": -1, "dog": 0}', "cat has the index -1"),
        ('{"cat": 0, "dog": 1, "cat": 1}', "'cat' stands twice"),
        ('{"a": "cat"}', "expected names with indices, or indices with names, found 'a'"),
        ('["cat", 3]', "expected a name or a list of names, found 3"),
        ('["cat", ', "no JSON"),
        ("[" * 100_000, "nested too deep"),
        ("", "it names no class"),
        ("[]", "it names no class"),
    ],
)
def test_what_is_no_order_of_these_classes_is_one_line(root, content, message):
    with pytest.raises(DataError) as caught:
        load_dataset(config(root, content))
    assert message in str(caught.value)
    assert "classes.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(root, tmp_path):
    for content, message in ((None, "No such file"), (b"\xff\xfe\xff", "no UTF-8 text")):
        path = tmp_path / "x"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_class_order(str(path))


def test_classes_without_names_have_no_order(tmp_path):
    (tmp_path / "c").write_text("cat\ndog\neel")
    name = "tests.data.own_data:Pictures"
    with pytest.raises(DataError, match="have no names"):
        load_dataset(NamedDataConfig(name=name, classes=str(tmp_path / "c"), workers=0))
    named = NamedDataConfig(name="tests.data.own_data:Named", classes=str(tmp_path / "c"), workers=0)
    assert load_dataset(named).class_names == ("cat", "dog", "eel")
