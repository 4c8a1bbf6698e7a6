"""What every function takes for data; torch's own DataLoader and concatenation are the oracle."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bncli.batches import Batches, check_repeatable, gather, gather_inputs, inputs_of, labelled, read_with
from bncli.errors import DataError

IMAGES, LABELS = torch.arange(10.0)[:, None], torch.arange(10)
SHAPES: dict[str, Callable[[], Batches]] = {
    "pair of tensors": lambda: (IMAGES, LABELS),
    "one pair in a list": lambda: [(IMAGES, LABELS)],
    "loader": lambda: DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4),
    "lists": lambda: [[IMAGES[:3], LABELS[:3]], [IMAGES[3:], LABELS[3:]]],
    "dicts": lambda: [{"pixel_values": IMAGES, "labels": LABELS}],
    "loader of dicts": lambda: DataLoader(
        [{"image": image, "label": label} for image, label in zip(IMAGES, LABELS, strict=True)],  # type: ignore[arg-type]
        batch_size=3,
    ),
    "function": lambda: lambda: iter([(IMAGES[:0], LABELS[:0]), (IMAGES, LABELS)]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_labelled_data_is_the_same_in_every_shape(shape: str) -> None:
    batches = SHAPES[shape]()
    pairs = list(labelled(batches))
    assert torch.equal(torch.cat([images for images, _ in pairs]), IMAGES)
    assert torch.equal(torch.cat([labels for _, labels in pairs]), LABELS)
    assert all(len(images) for images, _ in pairs)
    images, labels = gather(batches)
    assert torch.equal(images, IMAGES)
    assert torch.equal(labels, LABELS)
    check_repeatable(batches)
    if shape != "pair of tensors":  # without labels these are two batches
        assert torch.equal(torch.cat(list(inputs_of(batches))), IMAGES)
        assert torch.equal(gather_inputs(batches, 7), IMAGES[:7])


def test_a_pair_of_tensors_is_taken_without_a_copy() -> None:
    images, labels = gather((IMAGES, LABELS))
    assert images is IMAGES
    assert labels is LABELS


def test_a_tensor_is_one_batch() -> None:
    assert [len(inputs) for inputs in inputs_of(IMAGES)] == [10]
    assert [len(inputs) for inputs in inputs_of([IMAGES, IMAGES[:2], IMAGES], 2)] == [10, 2]


def test_other_batches_are_read_by_functions_of_the_caller() -> None:
    odd = [{"clip": IMAGES, "class_id": LABELS}]

    def get(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda batch: batch[name]

    images, labels = gather(odd, get("clip"), get("class_id"))
    assert torch.equal(images, IMAGES)
    assert torch.equal(labels, LABELS)
    twice = read_with(odd, get("clip"))
    for _ in range(2):
        assert torch.equal(torch.cat(list(inputs_of(twice))), IMAGES)
    once = read_with(iter(odd), get("clip"))
    with pytest.raises(DataError, match="only once"):
        check_repeatable(once)
    assert torch.equal(torch.cat(list(inputs_of(once))), IMAGES)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"clip": IMAGES}], "a dict with the keys clip, expected a tensor"),
        ([torch.tensor(3.0)], "a batch is a Tensor, expected a tensor"),
        (["text"], "a batch is a str"),
        ([(IMAGES,)], "its labels are not found"),
        ([IMAGES], "its labels are not found"),
        ([], "no images"),
    ],
)
def test_what_cannot_be_read_is_named(batches: Batches, message: str) -> None:
    with pytest.raises(DataError, match=message):
        gather(batches)
