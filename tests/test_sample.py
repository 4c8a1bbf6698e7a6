"""A sample of labelled images: random, the same everywhere, with every class's share."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bncli.sample import stratified_sample


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    share=st.fractions(0, 1),
    seed=st.integers(0, 3),
)
def test_each_class_has_its_share(counts: list[int], share: Fraction, seed: int) -> None:
    labels = torch.repeat_interleave(
        torch.arange(len(counts)) * 3, torch.tensor(counts)
    )  # sorted, as folders
    num_images = max(1, int(share * len(labels)))
    found = stratified_sample(labels, num_images, seed=seed)
    assert found.dtype == torch.int64
    assert len(found) == num_images == len(set(found.tolist()))
    given_by = Counter((labels[found] // 3).tolist())
    num_empty = 0
    for label, count in enumerate(counts):
        exact = Fraction(count * num_images, len(labels))
        if num_images >= len(counts):
            assert given_by[label] >= 1
            num_empty += exact < 1
        assert given_by[label] <= count
    for label, count in enumerate(counts):
        exact = Fraction(count * num_images, len(labels))
        # a class that would have had none takes an image from the largest
        assert exact - 1 - num_empty < given_by[label] < exact + 1 or given_by[label] == 1


def test_a_sorted_data_set_gives_both_classes_in_mixed_order() -> None:
    labels = torch.tensor([0] * 300 + [1] * 300)
    found = stratified_sample(labels, 256)
    assert labels[found].bincount().tolist() == [128, 128]
    runs = (labels[found][1:] != labels[found][:-1]).sum()
    assert 90 < runs < 165  # 128 expected; 1 if sorted


def test_every_image_of_a_class_is_as_likely() -> None:
    labels = torch.tensor([0] * 40 + [1] * 20)
    times = torch.zeros(60)
    for seed in range(600):
        times[stratified_sample(labels, 30, seed=seed)] += 1
    # each in half of the samples: binomial, standard deviation 12
    assert (times - 300).abs().max() < 60


def test_the_same_images_come_in_every_process_and_of_every_integer_type() -> None:
    labels = torch.arange(1000) % 10
    found = stratified_sample(labels, 8)
    assert torch.equal(found, stratified_sample(labels.to(torch.int32), 8))
    assert found.tolist() == KNOWN
    assert not torch.equal(found, stratified_sample(labels, 8, seed=1))


KNOWN = [44, 37, 675, 209, 500, 561, 928, 483]  # by torch 2.13.0


@pytest.mark.parametrize("num_images", [5, 6, 100])
def test_no_fewer_than_there_are_means_all_in_order(num_images: int) -> None:
    assert stratified_sample(torch.tensor([1, 0, 1, 2, 0]), num_images).tolist() == [0, 1, 2, 3, 4]


def test_shares_are_as_near_as_whole_numbers_can_be() -> None:
    """Of all ways to share, for small numbers, none is nearer by the sum of squares."""
    for counts in product((1, 2, 5), repeat=3):
        labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
        for num_images in range(sum(counts)):
            exact = [Fraction(num_images * count, sum(counts)) for count in counts]
            least = 1 if num_images >= 3 else 0
            ways = product(*(range(least, count + 1) for count in counts))
            best = min(distance(way, exact) for way in ways if sum(way) == num_images)
            found = labels[stratified_sample(labels, num_images)].bincount(minlength=3)
            assert distance(found.tolist(), exact) == best


def distance(way: Sequence[int], exact: Sequence[Fraction]) -> Fraction:
    return sum(((one - part) ** 2 for one, part in zip(way, exact, strict=True)), Fraction(0))


def test_rare_classes_are_there_and_the_largest_gives_for_them() -> None:
    labels = torch.tensor([0] * 991 + list(range(1, 10)))
    assert labels[stratified_sample(labels, 20)].bincount().tolist() == [11] + [1] * 9
    assert labels[stratified_sample(labels, 10)].bincount().tolist() == [1] * 10


def test_fewer_images_than_classes_are_of_different_classes_and_not_of_the_first() -> None:
    found = stratified_sample(torch.arange(100).repeat_interleave(10), 5) // 10
    assert len(set(found.tolist())) == 5
    assert found.max() >= 10
