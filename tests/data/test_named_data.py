"""Data sets by name: torchvision's and the user's own, of every kind, in memory and streamed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bncli.config import NamedDataConfig
from bncli.data import Dataset, for_training, load_dataset, named, sample_batches, sequential_batches
from bncli.data.iterable import IterableSplit
from bncli.data.streamed import StreamedSplit
from bncli.errors import DataError
from bncli.indexed import InMemory, pick
from tests.data.own_data import Stream, pixels

FILE = Path(__file__).parent / "own_data.py"


def load(name: str, **keys: object) -> Dataset:
    where = name if ":" in name else f"{FILE}:{name}"
    return load_dataset(NamedDataConfig(name=where, workers=0, **keys))


def refusal(name: str, **keys: object) -> str:
    with pytest.raises(DataError) as caught:
        load(name, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def expected(count: int, start: int = 0) -> torch.Tensor:
    return torch.stack([torch.from_numpy(pixels(start + number)).permute(2, 0, 1) for number in range(count)])


@pytest.mark.parametrize("name", ["Pictures", "tests.data.own_data:Pictures", "Named"])
@pytest.mark.parametrize("stream", [True, False, "auto"])
def test_pil_images_become_pixels(name, stream, capfd):
    dataset = load(name, stream=stream)
    assert isinstance(dataset.train, StreamedSplit if stream is True else InMemory)
    assert torch.equal(pick(dataset.train, range(12)), expected(12))
    assert torch.equal(pick(dataset.test, range(6)), expected(6, start=1000))
    assert dataset.train.labels.tolist() == [0, 1, 2] * 4
    if name == "Named":
        assert dataset.class_names == ("cat", "dog", "eel")
    else:
        assert dataset.class_names == (() if stream is True else ("0", "1", "2"))
        assert for_training(dataset).class_names == ("0", "1", "2")
    assert capfd.readouterr().out == ""  # what it prints is no result


def test_images_are_resized_as_those_of_folders():
    found = pick(load("Pictures", image_size=4).train, range(2))
    image = Image.fromarray(pixels(1)).resize((4, 4), Image.Resampling.BILINEAR)
    assert np.array_equal(found[1].permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize("name", ["Floats", "plain_loader"])
def test_numbers_that_are_normalised_already_stay_as_they_are(name):
    dataset = load(name)
    assert dataset.train.dtype == torch.float32
    assert torch.equal(pick(dataset.train, range(12)), ((expected(12).double() - 100) / 50).float())
    assert dataset.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(DataError, match="training takes PIL images, or uint8"):
        for_training(dataset)


def test_inputs_that_are_no_images_and_have_no_labels():
    dataset = load("sequences")
    assert dataset.train.labels is None
    assert dataset.train.image_shape == (5, 2)
    (first, labels), _ = sequential_batches(dataset.train, 6)
    assert first[:, 0, 0].tolist() == list(range(6))
    assert labels.tolist() == [-1] * 6
    assert dataset.class_names == ()


@pytest.mark.parametrize("name", ["Stream", "loader_of_stream"])
def test_an_iterable_that_does_not_fit_is_read_in_its_order(name, monkeypatch):
    kept = load(name)
    assert isinstance(kept.train, InMemory)
    monkeypatch.setattr(named, "_BATCH", 8)
    monkeypatch.setattr(named, "MAX_KEPT", 12 * 192)
    dataset = load(name)
    assert isinstance(dataset.train, IterableSplit)
    assert (len(dataset.train), dataset.train.image_shape) == (40, (3, 8, 8))
    assert torch.equal(dataset.train.labels, kept.train.labels)
    first, _ = sample_batches(dataset.train, 15, 30)
    assert torch.equal(first[0], expected(15))  # the beginning
    assert torch.equal(pick(dataset.train, torch.tensor([9, 3, 3])), expected(10)[[9, 3, 3]])
    found = [images for images, _ in dataset.train.batches_of([torch.tensor([7, 5]), torch.tensor([6, 7])])]
    assert torch.equal(torch.cat(found), expected(8)[[7, 5, 6, 7]])
    assert any("its beginning" in note for note in dataset.notes)
    assert any("the test samples are the training" in note for note in dataset.notes)
    with pytest.raises(DataError, match="cannot be shuffled"):
        for_training(dataset)


@pytest.mark.parametrize("stream", [True, False, "auto"])
@pytest.mark.parametrize("name", ["Endless", "Pictures", "plain_loader"])
def test_no_more_samples_are_read_than_asked_for(name, stream):
    dataset = load(name, stream=stream, num_train=5, num_test=3)
    assert (len(dataset.train), len(dataset.test)) == (5, 3)
    whole = load("Endless", num_train=40, num_test=3) if name == "Endless" else load(name)
    assert torch.equal(pick(dataset.train, range(5)), pick(whole.train, range(5)))
    assert torch.equal(pick(dataset.test, range(3)), pick(whole.test, range(3)))


def test_what_does_not_say_its_length_is_read_with_the_key_that_limits_it(monkeypatch):
    monkeypatch.setattr(named, "_BATCH", 8)
    said: list[tuple[str, int, int | None]] = []
    load_dataset(NamedDataConfig(name=f"{FILE}:Stream"), progress=lambda *one: said.append(one))
    text = "read the training split to its end (--set data.num_train=N reads fewer)"
    assert said == [(text, done, None) for done in (8, 16, 24, 32, 40)]


def test_an_iterable_that_ends_earlier_the_next_time_is_told():
    counts = iter([10, 5])
    split = IterableSplit(lambda: ((np.zeros(2), 0) for _ in range(next(counts))), 10, None)
    with pytest.raises(DataError, match="the first pass gave 10 inputs and a later one 5"):
        list(sequential_batches(split, 4))
    assert len(list(Stream(3))) == 3


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("raising", {}, "making the data set failed: RuntimeError: no luck (" + str(FILE)),
        ("number", {}, "expected that it returns a torch.utils.data.Dataset or a DataLoader, found int"),
        ("generator", {}, "can be read only once"),
        ("nothing", {}, "its training split has no samples"),
        ("empty_stream", {}, "its training split yields nothing"),
        (
            "Pictures",
            {"arguments": {"ragged": True}},
            f"data {FILE}:Pictures: inputs 0 and 4 differ: uint8 (3, 8, 8) and uint8 (3, 9, 9); all need one"
            " shape and type: data.image_size resizes PIL images",
        ),
        ("ragged_stream", {}, f"data {FILE}:ragged_stream: inputs 0 and 4 differ: uint8 (3, 8, 8) and uint8"),
        ("types", {}, "float32 (3, 4, 4) and uint8 (3, 4, 4); all need one shape and type: convert them"),
        ("huge_label", {}, "its label is 1" + 30 * "0" + ", expected a whole number from 0"),
        ("real_label", {}, "its label is 0.5, expected a whole number from 0"),
        ("bad_label", {}, "sample 1: its label is 'cat', expected a whole number from 0 to 9,999,999"),
        ("far_label", {}, "label 7 found, but its classes are 0 to 2"),
        ("bad_input", {}, "its input is of type str, expected a tensor"),
        ("Breaking", {}, "sample 5 failed: KeyError: 'five' (" + str(FILE)),
        ("needing", {}, "it needs folder: --set data.arguments.folder=VALUE"),
        ("Pictures", {"arguments": {"cuont": 2}}, "it has no argument cuont; the nearest: count"),
        ("Pictures", {"root": "x"}, "it has no argument root"),
        ("Picture", {}, "has no Picture; the nearest: Pictures"),
        ("Pictures", {"resize": 9}, "goes with data.image_size"),
        ("no.such.module:f", {}, "there is no module no"),
        ("no/such.py:f", {}, "there is no file no/such.py"),
        ("torchvision:SVNH", {}, "torchvision has no such data set; the nearest: SVHN"),
        ("torchvision:resnet18", {}, "torchvision has no such data set"),
        ("torchvision:", {}, "torchvision has no such data set"),
        (":f", {}, "expected torchvision:NAME"),
    ],
)
def test_what_cannot_be_used_is_one_line(name, keys, message):
    assert message in refusal(name, **keys)


@pytest.mark.parametrize("name", ["Pictures", "ragged_stream"])
def test_batches_that_are_read_later_are_told_with_the_name_too(name):
    arguments = {"ragged": True} if name == "Pictures" else {}
    dataset = load(name, stream=True, arguments=arguments)
    with pytest.raises(DataError) as caught:
        list(sequential_batches(dataset.train, 3))
    assert str(caught.value).startswith(f"data {FILE}:{name}: inputs 0 and 4 differ: ")


@pytest.mark.parametrize("stream", [True, False, "auto"])
def test_samples_that_never_end_are_not_counted_for_ever(monkeypatch, stream):
    monkeypatch.setattr(named, "_MAX_COUNTED", 100)
    message = refusal("Endless", stream=stream)
    assert "its training split has no length, and yields more than 100 samples" in message
    assert message.endswith("; --set data.num_train=N says how many to read")
    assert len(load("Endless", stream=stream, num_train=101, num_test=1).train) == 101


@pytest.mark.parametrize("name", ["SVHN", "CIFAR100", "MNIST", "Food101", "STL10"])
def test_torchvisions_that_are_not_there_say_so_and_nothing_is_fetched(name, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", None)
    root = tmp_path / "none"
    message = refusal(f"torchvision:{name}", root=str(root))
    assert "making the data set failed: RuntimeError: Dataset not found" in message
    assert message.endswith("; here that is --set data.arguments.download=true")
    assert not list(root.rglob("*")) if root.exists() else True


def test_a_torchvision_data_set_is_read_with_its_arguments():
    arguments = {"size": 6, "image_size": [3, 9, 7], "num_classes": 4}
    dataset = load("torchvision:FakeData", arguments=arguments)
    assert dataset.train.image_shape == (3, 9, 7)
    assert len(dataset.test) == 6
    assert "the test samples are the training" in dataset.notes[0]


def test_torchvisions_train_and_test_splits_are_chosen_by_its_own_parameter(tmp_path):
    """Of the real Imagenette, which knows train and val; the folders are as its archive has them."""
    for split, count in (("train", 3), ("val", 2)):
        for wnid in named_imagenette():
            folder = tmp_path / "imagenette2" / split / wnid
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(pixels(number)).save(folder / f"{number}.JPEG")
    dataset = load("torchvision:Imagenette", root=str(tmp_path))
    assert (len(dataset.train), len(dataset.test)) == (30, 20)
    assert dataset.class_names[0] == "tench, Tinca tinca"


def named_imagenette() -> list[str]:
    from bncli.torchvision_compat import import_torchvision

    return list(import_torchvision().datasets.imagenette.Imagenette._WNID_TO_CLASS)
