"""Population statistics before each validation, in a loop of one's own."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bncli
from bncli.errors import DataError


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.fixture
def loader() -> DataLoader[tuple[Tensor, ...]]:
    images = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 2
    return DataLoader(TensorDataset(images, torch.arange(60) % 5), batch_size=20, shuffle=True)


def images_of(loader: DataLoader[tuple[Tensor, ...]]) -> Tensor:
    return loader.dataset.tensors[0]  # type: ignore[attr-defined]


def test_the_statistics_are_those_of_the_images_in_float64(loader: DataLoader[tuple[Tensor, ...]]) -> None:
    model = network()
    found = bncli.recalibrate_before_validation(model, loader)
    inputs = model[0](images_of(loader)).detach().double()
    torch.testing.assert_close(model[1].running_mean.double(), inputs.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    expected = inputs.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(model[1].running_var.double(), expected, rtol=1e-5, atol=1e-6)
    assert (found.num_images, model[1].num_batches_tracked.item()) == (60, 0)


def test_the_log_says_how_far_the_statistics_were_off(loader: DataLoader[tuple[Tensor, ...]]) -> None:
    model = network()
    log = bncli.recalibrate_before_validation(model, loader).to_log("bn/")
    mean, var = model[1].running_mean.double(), model[1].running_var.double()  # before: (0, 1)
    shift = (mean / (var + 1e-5).sqrt()).square().mean().sqrt()
    ratio = ((1 + 1e-5) / (var + 1e-5)).log().mean().exp()
    expected = {"bn/mean_shift": shift, "bn/var_ratio_min": ratio, "bn/var_ratio_max": ratio}
    assert log == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-6)
    again = bncli.recalibrate_before_validation(model, loader).to_log()
    assert again == pytest.approx(
        {"batch_norm/mean_shift": 0, "batch_norm/var_ratio_min": 1, "batch_norm/var_ratio_max": 1}, abs=1e-6
    )


def test_of_several_layers_the_log_has_the_worst(loader: DataLoader[tuple[Tensor, ...]]) -> None:
    found = bncli.recalibrate_before_validation(network(), loader)
    (layer,) = found.layers
    layers = [
        replace(layer, mean_shift_in_new_deviations=s, var_ratio=r) for s, r in [(1, 0.5), (3, 1), (2, 4)]
    ]
    log = replace(found, layers=tuple(layers)).to_log("")
    assert log == {"mean_shift": 3, "var_ratio_min": 0.5, "var_ratio_max": 4}


class RandomlyBrighter(TensorDataset):
    """Draws from Python's and from numpy's random numbers, as augmentation without workers does."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, label = super().__getitem__(index)
        return image + random.random() + np.random.rand(), label


def train(loader: DataLoader[tuple[Tensor, ...]], *, with_hook: bool) -> list[Tensor]:
    """Three epochs of plain training, with augmentation from all three sources of random numbers."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    random.seed(2)
    np.random.seed(3)
    torch.manual_seed(4)
    for _ in range(3):
        for images, labels in loader:
            noise = torch.rand(())
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images + noise), labels).backward()
            optimizer.step()
        if with_hook:
            bncli.recalibrate_before_validation(model, loader, num_images=40)
            assert model.training
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("own_generator", [False, True])
def test_training_has_the_same_bits_with_it(
    loader: DataLoader[tuple[Tensor, ...]], own_generator: bool
) -> None:
    data = RandomlyBrighter(*loader.dataset.tensors)  # type: ignore[attr-defined]

    def fresh() -> DataLoader[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(7) if own_generator else None
        return DataLoader(data, batch_size=20, shuffle=True, generator=generator)

    without, with_it = train(fresh(), with_hook=False), train(fresh(), with_hook=True)
    assert all(torch.equal(a, b) for a, b in zip(without, with_it, strict=True))


@pytest.mark.parametrize(("num_images", "seen"), [(1, 20), (20, 20), (21, 40), (1000, 60)])
def test_whole_batches_are_read_until_there_are_enough(
    loader: DataLoader[tuple[Tensor, ...]], num_images: int, seen: int
) -> None:
    assert bncli.recalibrate_before_validation(network(), loader, num_images=num_images).num_images == seen


def test_bad_batches_leave_model_and_random_numbers_as_they_were() -> None:
    model, before = network(), network().state_dict()
    state = torch.get_rng_state()
    with pytest.raises(DataError):
        bncli.recalibrate_before_validation(model, lambda: [torch.rand(4, 3, 8, 8), "no tensor"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
