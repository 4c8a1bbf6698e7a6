import hashlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bncli.config import AugmentConfig, SyntheticConfig
from bncli.data import (
    BatchPlan,
    Dataset,
    load_dataset,
    measure_normalization,
    sequential_batches,
    training_batches,
)
from bncli.data.synthetic import CLASS_NAMES


def load(num_train: int = 600, num_test: int = 50, seed: int = 0) -> Dataset:
    return load_dataset(SyntheticConfig(num_train=num_train, num_test=num_test, seed=seed))


@pytest.fixture(scope="module")
def default() -> Dataset:
    return load_dataset(SyntheticConfig())


def test_the_default_set_is_10000_and_2000_balanced_images(default):
    assert default.train.images.shape == (10_000, 3, 32, 32)
    assert default.test.images.shape == (2_000, 3, 32, 32)
    assert default.class_names == CLASS_NAMES
    assert torch.bincount(default.train.labels).tolist() == [1_000] * 10
    assert torch.bincount(default.test.labels).tolist() == [200] * 10


def test_a_seed_always_gives_the_same_bits():
    dataset = load()
    digest = hashlib.sha256(dataset.train.images.numpy().tobytes() + dataset.test.labels.numpy().tobytes())
    # recorded; if it changes, every published number about this set does too
    assert digest.hexdigest()[:16] == "824c09a913d0314c"


def test_the_first_images_do_not_depend_on_how_many_are_asked_for():
    few, many = load(num_train=510), load(num_train=1234)
    assert torch.equal(few.train.images, many.train.images[:510])
    assert torch.equal(few.train.labels, many.train.labels[:510])
    assert torch.equal(few.test.images, many.test.images)


def test_no_image_is_in_both_splits_or_of_another_seed():
    splits = [load(600, 600, seed=seed) for seed in (0, 1)]
    images = [image.numpy().tobytes() for d in splits for s in (d.train, d.test) for image in s.images]
    assert len(set(images)) == len(images) == 2400


def test_progress_counts_the_images_of_both_splits():
    calls = []
    config = SyntheticConfig(num_train=600, num_test=50)
    load_dataset(config, progress=lambda *call: calls.append(call))
    assert calls == [("draw images", done, 650) for done in (500, 600, 650)]


def test_no_test_image_is_drawn_where_only_training_images_are_wanted():
    calls = []
    config = SyntheticConfig(num_train=600, num_test=50)
    found = load_dataset(config, progress=lambda *call: calls.append(call), only_train=True)
    assert [total for *_, total in calls] == [600, 600]
    assert found.test is found.train
    assert torch.equal(found.train.images, load_dataset(config).train.images)


def test_stripes_vary_across_themselves_only(default):
    """A check of what the classes look like: directions of change, averaged over images."""
    pixels = default.train.images.double().mean(1)
    down = (pixels[:, 3:] - pixels[:, :-3]).square().mean((1, 2))
    right = (pixels[..., 3:] - pixels[..., :-3]).square().mean((1, 2))
    ratio = [(down / right)[default.train.labels == label].median().item() for label in range(10)]
    assert ratio[CLASS_NAMES.index("horizontal stripes")] > 1.5
    assert ratio[CLASS_NAMES.index("vertical stripes")] < 1 / 1.5
    assert all(0.8 < ratio[label] < 1.25 for label in (0, 1, 2, 3, 5, 6, 9))


@pytest.fixture(scope="module")
def normalized(default) -> Callable[[Tensor], Tensor]:
    measured = measure_normalization(default.train.images)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (measured.mean, measured.std))
    return lambda images: (images.float() / 255 - mean) / std


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def test_a_linear_classifier_on_pixels_stays_below_half(default, normalized):
    images = normalized(default.train.images).flatten(1)
    weight = torch.zeros(10, images.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(images @ weight.T, default.train.labels) + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        assert accuracy(images @ weight.T, default.train.labels) > 0.3  # it did learn by heart
        test_images = normalized(default.test.images).flatten(1)
        assert accuracy(test_images @ weight.T, default.test.labels) < 0.5


def block(num_in: int, num_out: int) -> list[nn.Module]:
    return [nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()]


@pytest.mark.slow
def test_a_small_network_gets_nearly_all_right_in_five_epochs(default, normalized):
    torch.manual_seed(0)
    layers, num_in = [], 3
    for width in (16, 32, 64):
        layers += [*block(num_in, width), nn.MaxPool2d(2), *block(width, width)]
        num_in = width
    model = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    plan = BatchPlan(len(default.train), 250)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=5 * plan.num_steps)
    for epoch in range(5):
        batches = training_batches(
            default.train, plan, AugmentConfig(), seed=0, epoch=epoch, fill=(0.5, 0.5, 0.5)
        )
        for images, labels in batches:
            optimizer.zero_grad()
            logits = model(normalized(images))
            F.cross_entropy(logits, labels, label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        logits = [model(normalized(images)) for images, _ in sequential_batches(default.test, 500)]
    reached = accuracy(torch.cat(logits), default.test.labels)
    print(f"accuracy {reached:.4f}")
    assert 0.9 < reached < 1.0
