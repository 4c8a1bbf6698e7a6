import numpy as np
import pytest
import torch

from bncli.config import Cifar10Config
from bncli.data import Normalization, load_dataset, measure_normalization
from bncli.errors import DataError


@pytest.mark.parametrize("shape", [(300, 3, 5, 7), (1300, 3, 32, 32)])  # one part, and three of them
def test_mean_and_deviation_equal_numpys_in_float64(rng, shape):
    images = rng.integers(0, 256, shape) * np.array([1, 0.5, 0.1]).reshape(1, 3, 1, 1)
    images = images.astype(np.uint8)
    found = measure_normalization(torch.from_numpy(images))
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, scaled.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(found.std, scaled.std((0, 2, 3)), rtol=1e-13)


def test_one_odd_pixel_among_many_is_not_lost_to_rounding():
    images = torch.full((1000, 3, 32, 32), 255, dtype=torch.uint8)
    images[0, :, 0, 0] = 254
    n = 1000 * 32 * 32
    std = (1 / n * (1 - 1 / n)) ** 0.5 / 255
    assert measure_normalization(images).std == pytest.approx((std,) * 3, rel=1e-13)


def test_a_constant_channel_gets_one_pixel_step():
    images = torch.tensor([0, 7, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(4, 3, 2, 2)
    expected = Normalization(mean=(0.0, 7 / 255, 1.0), std=(1 / 255,) * 3)
    assert measure_normalization(images) == expected


def test_no_images_are_an_error():
    with pytest.raises(DataError, match="no images"):
        measure_normalization(torch.empty(0, 3, 32, 32, dtype=torch.uint8))


def test_the_real_cifar10_has_its_known_values(real_cifar10):
    images = load_dataset(Cifar10Config(root=str(real_cifar10))).train.images
    found = measure_normalization(images)
    assert [round(value, 4) for value in found.mean] == [0.4914, 0.4822, 0.4465]
    assert [round(value, 4) for value in found.std] == [0.2470, 0.2435, 0.2616]
