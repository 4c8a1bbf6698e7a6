import torch
from hypothesis import given
from hypothesis import strategies as st

from bncli.determinism.pairing import (
    Rearranged,
    at_other_places,
    consecutive,
    one_by_one,
    with_other_neighbours,
)

NUM_IMAGES = st.integers(2, 40)
BATCH_SIZES = st.integers(2, 40)


def companions(images: torch.Tensor) -> list[list[list[int]]]:
    """For every place of every batch, the images at the other places, sorted."""
    return [[sorted(row[:place] + row[place + 1 :]) for place in range(len(row))] for row in images.tolist()]


def check_bookkeeping(images: torch.Tensor, moved: Rearranged) -> None:
    assert sorted(moved.moved_to.flatten().tolist()) == list(range(images.numel()))
    assert torch.equal(moved.images.flatten()[moved.moved_to.flatten()], images.flatten())


@given(NUM_IMAGES, BATCH_SIZES)
def test_consecutive_batches_show_every_image(num_images: int, size: int) -> None:
    images = consecutive(num_images, size)
    assert images.shape[0] >= 2
    assert images.shape[1] == size
    assert images[0].tolist() == [place % num_images for place in range(size)]
    assert set(images.flatten().tolist()) == set(range(num_images))


@given(NUM_IMAGES, BATCH_SIZES)
def test_with_other_neighbours_the_place_stays_and_the_companions_change(num_images: int, size: int) -> None:
    images = consecutive(num_images, size)
    moved = with_other_neighbours(images)
    check_bookkeeping(images, moved)
    before, after = companions(images), companions(moved.images)
    for batch in range(len(images)):
        for place in range(size):
            new_batch, new_place = divmod(int(moved.moved_to[batch, place]), size)
            assert new_place == place
            assert after[new_batch][new_place] != before[batch][place]


@given(NUM_IMAGES, BATCH_SIZES, st.integers(0, 3))
def test_at_other_places_the_companions_stay_and_every_place_changes(
    num_images: int, size: int, seed: int
) -> None:
    images = consecutive(num_images, size)
    moved = at_other_places(images, seed)
    check_bookkeeping(images, moved)
    for batch in range(len(images)):
        assert sorted(moved.images[batch].tolist()) == sorted(images[batch].tolist())
        for place in range(size):
            new_batch, new_place = divmod(int(moved.moved_to[batch, place]), size)
            assert new_batch == batch
            assert new_place != place


def test_one_by_one_every_image_is_alone() -> None:
    assert one_by_one(3).tolist() == [[0], [1], [2]]
