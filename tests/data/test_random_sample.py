from collections.abc import Iterable, Iterator
from itertools import chain

import pytest
import torch
from torch import Tensor

from bncli.data import Split, sample_batches, sequential_batches
from bncli.errors import ConfigError
from bncli.indexed import Indices


@pytest.fixture
def split() -> Split:
    """Sorted by class, as folders are; each image says which one it is."""
    numbers = torch.arange(200, dtype=torch.uint8)
    return Split(numbers[:, None, None, None].expand(200, 3, 2, 2).contiguous(), numbers.long() // 20)


def numbers(split: Split, batch_size: int, num_images: int) -> list[list[int]]:
    return [images[:, 0, 0, 0].tolist() for images, _ in sample_batches(split, batch_size, num_images)]


def test_every_image_comes_once_with_its_label(split: Split) -> None:
    pairs = list(sample_batches(split, 30, 200))
    images = torch.cat([images for images, _ in pairs])[:, 0, 0, 0].long()
    assert sorted(images.tolist()) == list(range(200))
    assert torch.equal(torch.cat([labels for _, labels in pairs]), images // 20)


def test_a_batch_of_a_sorted_folder_holds_many_classes(split: Split) -> None:
    for _, labels in sample_batches(split, 50, 200):
        assert len(labels.unique()) >= 8


def test_a_shorter_sample_is_the_beginning_of_a_longer_one_in_batches_of_any_size(split: Split) -> None:
    whole = list(chain.from_iterable(numbers(split, 30, 200)))
    assert list(chain.from_iterable(numbers(split, 7, 100))) == whole[:100]
    assert numbers(split, 30, 60) == numbers(split, 30, 200)[:2]


@pytest.mark.parametrize(
    ("batch_size", "num_images", "sizes"),
    [
        (50, 120, [50, 50, 20]),
        (50, 101, [50, 51]),  # a single image left over joins the batch before
        (50, 500, [50, 50, 50, 50]),
        (500, 200, [200]),
        (1, 3, [1, 1, 1]),
    ],
)
def test_no_image_is_left_alone_unless_asked_for(
    split: Split, batch_size: int, num_images: int, sizes: list[int]
) -> None:
    assert [len(batch) for batch in numbers(split, batch_size, num_images)] == sizes


def test_a_single_image_is_too_few(split: Split) -> None:
    with pytest.raises(ConfigError):
        numbers(split, 50, 1)


class Watched(Split):
    """Remembers which images were asked for."""

    def batches_of(self, batches: Iterable[Indices]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            asked.append(list(map(int, batch)))
            yield from super().batches_of([batch])


asked: list[list[int]] = []


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_ranks_have_the_batches_of_one_process_in_turn_and_read_no_others(
    split: Split, num_ranks: int
) -> None:
    watched = Watched(split.images, split.labels)
    for batches_of in (lambda **rank: sample_batches(watched, 30, 200, **rank),
                       lambda **rank: sequential_batches(watched, 30, **rank)):  # fmt: skip
        expected = [labels.tolist() for _, labels in batches_of()]
        for rank in range(num_ranks):
            asked.clear()
            found = [labels.tolist() for _, labels in batches_of(rank=rank, num_ranks=num_ranks)]
            assert found == expected[rank::num_ranks]
            assert [[number // 20 for number in batch] for batch in asked] == found
