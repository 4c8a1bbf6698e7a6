import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bncli.config import AugmentConfig
from bncli.data import BatchPlan, Split, augment, sequential_batches, training_batches
from bncli.errors import ConfigError, DataError

PLAIN = AugmentConfig(crop_padding=0, flip="none", cutout=0)
RANDOM = AugmentConfig(crop_padding=2, flip="random", cutout=2)
FILL = (0.5, 0.5, 0.5)

sizes = st.integers(1, 500)


@settings(max_examples=300, deadline=None)
@given(num_images=sizes, batch_size=sizes, last_batch=st.sampled_from(["drop", "keep"]), min_batch=sizes)
def test_a_plan_uses_images_at_most_once_in_batches_that_are_large_enough(
    num_images, batch_size, last_batch, min_batch
):
    impossible = min_batch > min(num_images, batch_size) or (last_batch == "drop" and batch_size > num_images)
    if impossible:
        with pytest.raises(ConfigError, match=r"train\.batch_size|training images"):
            BatchPlan(num_images, batch_size, last_batch, min_batch)
        return
    plan = BatchPlan(num_images, batch_size, last_batch, min_batch)
    batches = plan.batch_sizes
    assert plan.num_images_per_epoch == sum(batches) <= num_images
    assert plan.num_steps == len(batches)
    assert plan.last_batch_size == batches[-1]
    assert min(batches) >= min_batch
    assert all(size == batch_size for size in batches[:-1])
    if last_batch == "keep":
        assert sum(batches) == num_images
        assert batches[-1] < batch_size + min_batch
    else:
        assert num_images - sum(batches) < batch_size
        assert batches[-1] == batch_size


@pytest.mark.parametrize(
    ("arguments", "batches"),
    [
        ((103, 25, "drop", 2), (25, 25, 25, 25)),
        ((103, 25, "keep", 2), (25, 25, 25, 25, 3)),
        ((101, 25, "keep", 2), (25, 25, 25, 26)),  # one image alone: BatchNorm would see one value
        ((101, 25, "keep", 1), (25, 25, 25, 25, 1)),
        ((100, 25, "keep", 2), (25, 25, 25, 25)),
        ((7, 25, "keep", 2), (7,)),
        ((26, 25, "keep", 2), (26,)),
    ],
)
def test_the_last_batch_is_dropped_kept_or_merged(arguments, batches):
    assert BatchPlan(*arguments).batch_sizes == batches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (100, 250, "drop", 2),
            "train.batch_size: 250 is more than the 100 .* at most 100, .*last_batch to keep",
        ),
        ((100, 1, "keep", 2), "train.batch_size: 1 is too small .*at least 2"),
        ((1, 25, "keep", 2), "1 training images are too few for a batch of 2"),
        ((0, 25, "keep", 1), "0 training images are too few"),
    ],
)
def test_an_impossible_plan_says_what_to_change(arguments, message):
    with pytest.raises(ConfigError, match=message):
        BatchPlan(*arguments)


def epoch(split: Split, plan: BatchPlan, config: AugmentConfig = PLAIN, **where: int):
    return list(training_batches(split, plan, config, fill=FILL, **({"seed": 0, "epoch": 0} | where)))


def labels_of(batches) -> list[int]:
    return torch.cat([labels for _, labels in batches]).tolist()


def test_every_image_comes_once_with_its_own_label(numbered_split):
    batches = epoch(numbered_split, BatchPlan(103, 25, "keep"))
    assert [len(labels) for _, labels in batches] == [25, 25, 25, 25, 3]
    assert sorted(labels_of(batches)) == list(range(103))
    for images, labels in batches:
        assert images.shape == (len(labels), 3, 8, 8)
        assert images.dtype == torch.uint8
        assert torch.equal(images, labels.view(-1, 1, 1, 1).expand_as(images).to(torch.uint8))


def test_drop_leaves_out_other_images_in_each_epoch(numbered_split):
    plan = BatchPlan(103, 25, "drop")
    seen = [set(labels_of(epoch(numbered_split, plan, epoch=e))) for e in range(3)]
    assert [len(labels) for labels in seen] == [100, 100, 100]
    assert len({frozenset(labels) for labels in seen}) == 3


def test_the_order_is_a_function_of_seed_and_epoch(numbered_split):
    plan = BatchPlan(103, 25, "keep")
    orders = {
        where: labels_of(epoch(numbered_split, plan, seed=where[0], epoch=where[1]))
        for where in itertools.product(range(3), range(3))
    }
    torch.manual_seed(1)
    assert labels_of(epoch(numbered_split, plan, seed=1, epoch=2)) == orders[1, 2]
    assert len({tuple(order) for order in orders.values()}) == 9
    assert list(range(103)) not in orders.values()


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_an_epoch_continues_in_its_middle_with_the_same_bits(numbered_split, start):
    plan = BatchPlan(103, 25, "keep")
    whole = epoch(numbered_split, plan, RANDOM, seed=3, epoch=4)
    rest = epoch(numbered_split, plan, RANDOM, seed=3, epoch=4, start_step=start)
    assert len(rest) == 5 - start
    for (images, labels), (same_images, same_labels) in zip(whole[start:], rest, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


def test_images_are_augmented_with_their_place_in_the_split(rng):
    pixels = torch.from_numpy(rng.integers(0, 256, (50, 3, 8, 8), dtype="uint8"))
    split = Split(pixels, torch.arange(50))
    for config in (RANDOM, AugmentConfig()):
        batches = epoch(split, BatchPlan(50, 20, "keep"), config, seed=1, epoch=3)
        for step, (images, places) in enumerate(batches):
            where = {"seed": 1, "epoch": 3, "step": step}
            assert torch.equal(images, augment(pixels[places], places.numpy(), config, fill=FILL, **where))


def test_problems_are_raised_before_the_first_batch_is_asked_for(numbered_split):
    where = {"seed": 0, "epoch": 0, "fill": FILL}
    with pytest.raises(DataError, match=r"augment\.crop_padding"):
        training_batches(numbered_split, BatchPlan(103, 25), AugmentConfig(crop_padding=8), **where)
    with pytest.raises(ValueError, match="the plan is for 100 images, the split has 103"):
        training_batches(numbered_split, BatchPlan(100, 25), PLAIN, **where)


def test_sequential_batches_keep_order_and_lose_nothing(numbered_split):
    batches = list(sequential_batches(numbered_split, 50))
    assert [len(images) for images, _ in batches] == [50, 50, 3]
    assert labels_of(batches) == list(range(103))
    assert torch.equal(torch.cat([images for images, _ in batches]), numbered_split.images)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), "uint8"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"\(2, 4, 4, 3\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"shape \(2,\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), "int64"),
    ],
)
def test_a_split_checks_its_shapes_and_types(images, labels, message):
    with pytest.raises(DataError, match=message):
        Split(images, labels)
