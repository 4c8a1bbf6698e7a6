import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bncli.config import AugmentConfig
from bncli.data import augment
from bncli.data.augment import _shrink, check_augmentation
from bncli.errors import DataError

OFF = {"crop_padding": 0, "flip": "none", "cutout": 0}
FILL = (0.5, 0.25, 1.0)


def config(**changes: object) -> AugmentConfig:
    return AugmentConfig(**(OFF | changes))


def run(images: torch.Tensor, settings: AugmentConfig, **where: int) -> torch.Tensor:
    where = {"seed": 0, "epoch": 0, "step": 0} | where
    return augment(images, np.arange(len(images)), settings, fill=FILL, **where)


@pytest.fixture
def images(rng) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 256, (400, 3, 10, 12), dtype=np.uint8))


def candidates(image: torch.Tensor, padding: int) -> dict[tuple[int, int, bool], bytes]:
    """Every crop of PyTorch's reflection-padded image, with and without a flip."""
    height, width = image.shape[1:]
    padded = F.pad(image[None].float(), (padding,) * 4, mode="reflect")[0].to(torch.uint8)
    found = {}
    for y in range(2 * padding + 1):
        for x in range(2 * padding + 1):
            crop = padded[:, y : y + height, x : x + width]
            found[y - padding, x - padding, False] = crop.numpy().tobytes()
            found[y - padding, x - padding, True] = crop.flip(-1).numpy().tobytes()
    return found


def shifts_and_flips(before: torch.Tensor, after: torch.Tensor, padding: int) -> list[tuple[int, int, bool]]:
    results = []
    for old, new in zip(before, after, strict=True):
        wanted = new.contiguous().numpy().tobytes()
        matches = [key for key, crop in candidates(old, padding).items() if crop == wanted]
        assert len(matches) == 1  # random pixels: exactly one crop explains the result
        results.append(matches[0])
    return results


def test_everything_off_changes_nothing(images):
    assert torch.equal(run(images, config()), images)


def test_each_result_is_a_crop_of_the_reflection_padded_image(images):
    images = images[:200]
    after = run(images, config(crop_padding=3))
    assert after.shape == images.shape
    assert after.dtype == torch.uint8
    found = shifts_and_flips(images, after, 3)
    assert not any(flipped for _, _, flipped in found)
    # 200 images, 49 shifts: 0.8 of them missing on average
    assert len(set(found)) >= 44


def test_the_largest_padding_reflects_up_to_the_far_border(images):
    # so far out that some crops are mirror images of others: several may explain a result
    after = run(images[:50], config(crop_padding=9))
    for old, new in zip(images[:50], after, strict=True):
        assert new.numpy().tobytes() in {crop for (_, _, f), crop in candidates(old, 9).items() if not f}


def test_the_input_is_not_changed(images):
    before = images.clone()
    run(images, config(crop_padding=2, flip="random", cutout=4))
    assert torch.equal(images, before)


def test_shift_and_flip_are_independent(images):
    found = shifts_and_flips(images, run(images, config(crop_padding=2, flip="random")), 2)
    for side in (-2, 2):
        flipped = [f for _, x, f in found if x == side]
        assert 0.25 < sum(flipped) / len(flipped) < 0.75


def flips(images: torch.Tensor, kind: str, **where: int) -> np.ndarray:
    after = run(images, config(flip=kind), **where)
    return np.array([flipped for _, _, flipped in shifts_and_flips(images, after, 0)])


def test_random_flips_are_half_and_new_in_each_epoch_and_step(images):
    first = flips(images, "random")
    assert 0.4 < first.mean() < 0.6
    for other in (flips(images, "random", epoch=1), flips(images, "random", step=1)):
        assert 0.4 < (first == other).mean() < 0.6


def test_alternating_flips_show_every_image_both_ways_in_two_epochs(images):
    first = flips(images, "alternating", seed=5)
    assert 0.4 < first.mean() < 0.6
    assert np.array_equal(flips(images, "alternating", seed=5, epoch=1), ~first)
    assert np.array_equal(flips(images, "alternating", seed=5, epoch=2), first)
    assert np.array_equal(flips(images, "alternating", seed=5, step=9), first)
    assert 0.4 < (flips(images, "alternating", seed=6) == first).mean() < 0.6


def test_the_alternating_flip_belongs_to_the_image_not_to_its_place(images):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    settings, where = config(flip="alternating"), {"seed": 1, "epoch": 0, "fill": FILL}
    straight = augment(images, np.arange(len(images)), settings, step=0, **where)
    shuffled = augment(images[order], order.numpy(), settings, step=7, **where)
    assert torch.equal(shuffled, straight[order])


def test_neighbouring_images_and_seeds_flip_independently(images):
    many = images[:1].expand(20_000, -1, -1, -1)
    for seed in range(4):
        flipped = (run(many, config(flip="alternating"), seed=seed) != many).flatten(1).any(1)
        repeats = (flipped[1:] == flipped[:-1]).double().mean().item()
        assert abs(flipped.double().mean().item() - 0.5) < 0.02  # 5.6 standard deviations
        assert abs(repeats - 0.5) < 0.02


@pytest.mark.parametrize("side", [3, 4, 5, 10])
def test_cutout_fills_one_square_cut_off_at_the_border(images, side):
    images = images.clamp(max=100)
    after = run(images, config(cutout=side))
    colour = torch.tensor([128, 64, 255], dtype=torch.uint8)
    for old, new in zip(images, after, strict=True):
        changed = (new != old).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        box = new[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert torch.equal(box, colour.view(3, 1, 1).expand_as(box))
        assert changed.sum() == box[0].numel()
        for places, size in ((rows, 10), (columns, 12)):
            assert len(places) == side or places[0] == 0 or places[-1] == size - 1
            assert len(places) <= side
    erased = (after != images).any(1)
    assert erased.any(0).all()  # every pixel is erased in some image
    heights, widths = erased.any(2).sum(1), erased.any(1).sum(1)
    for edge, extent in (
        (erased[:, 0], heights),
        (erased[:, -1], heights),
        (erased[:, :, 0], widths),
        (erased[:, :, -1], widths),
    ):
        assert extent[edge.any(1)].min() < side  # squares are cut off at all four borders


def test_the_square_does_not_depend_on_the_other_changes_being_random(images):
    flat = torch.full_like(images, 7)
    erased = [run(flat, config(cutout=3, flip=kind)) != flat for kind in ("none", "alternating", "random")]
    assert not torch.equal(erased[0], torch.zeros_like(erased[0]))
    assert torch.equal(erased[1], erased[2])


def test_a_gpu_shrinks_images_like_a_cpu_to_within_one_level(images):
    """On a GPU antialiasing takes floating point only; the meta device has no integers for it either."""
    on_cpu = _shrink(images, 8)
    in_floats = F.interpolate(images.float(), size=(8, 8), mode="bilinear", antialias=True)
    assert (on_cpu - in_floats.round()).abs().max() <= 1
    elsewhere = _shrink(images.to("meta"), 8)
    assert (elsewhere.dtype, elsewhere.shape) == (torch.uint8, on_cpu.shape)


def test_the_first_epochs_see_smaller_images(images):
    settings = config(crop_padding=2, flip="random", small_epochs=2, small_size=8)
    for epoch in range(4):
        whole = run(images, config(crop_padding=2, flip="random"), epoch=epoch)
        shrunk = F.interpolate(whole.double(), (8, 8), mode="bilinear", antialias=True)
        result = run(images, settings, epoch=epoch)
        assert result.dtype == torch.uint8
        if epoch < 2:
            assert (result - shrunk).abs().max() < 1.5  # rounded, after each of the two directions
        else:
            assert torch.equal(result, whole)


def test_the_epochs_after_small_ones_see_the_middle_of_the_shifted_images(images):
    settings = config(
        crop_padding=2, flip="random", cutout=3, small_epochs=1, small_size=8, crop_epochs=2, crop_size=6
    )
    for epoch in range(5):
        whole = run(images, config(crop_padding=2, flip="random", cutout=3), epoch=epoch)
        result = run(images, settings, epoch=epoch)
        if epoch in {1, 2}:
            assert torch.equal(result, whole[:, :, 2:8, 3:9])
            assert result.is_contiguous()
        else:
            assert result.shape[2:] == ((8, 8) if epoch == 0 else (10, 12))


def test_the_result_is_a_function_of_seed_epoch_and_step(images):
    settings = config(crop_padding=2, flip="random", cutout=3)
    torch.manual_seed(0)
    first = run(images, settings, seed=1, epoch=2, step=3)
    torch.manual_seed(1)
    np.random.default_rng().random()
    assert torch.equal(run(images, settings, seed=1, epoch=2, step=3), first)
    for where in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2), (2, 1, 3)):
        other = run(images, settings, **dict(zip(("seed", "epoch", "step"), where, strict=True)))
        assert not torch.equal(other, first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_padding": 10}, "augment.crop_padding: 10 .* 10x12 pixels; set it to at most 9"),
        ({"cutout": 11}, "augment.cutout: 11 .* 10x12 pixels; set it to at most 10"),
        (
            {"crop_epochs": 1, "crop_size": 11},
            "augment.crop_size: 11 .* 10x12 pixels; set it to at most 10, or augment.crop_epochs to 0",
        ),
        (
            {"small_epochs": 1, "small_size": 11},
            "augment.small_size: 11 .* 10x12 pixels; set it to at most 10",
        ),
    ],
)
def test_images_that_are_too_small_are_refused(images, changes, message):
    with pytest.raises(DataError, match=message):
        run(images, config(**changes))
    with pytest.raises(DataError, match=message):
        check_augmentation(config(**changes), 10, 12)
