"""ReLU behind max pooling: the bits of ReLU before it, in the same network."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from bncli.config import ConvNetConfig
from bncli.config_file import load_config
from bncli.models.convnet import build_model
from bncli.training import pooling
from bncli.training.loop import training_step
from bncli.training.pooling import MaxPoolReLU2d, WaitingReLU, pool_before_relu
from bncli.training.run import Run
from bncli.training.setup import prepare

FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(autouse=True)
def no_maps_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "_SMALL", 0)


def pair(**options: object) -> tuple[nn.Sequential, nn.Sequential]:
    """ReLU and pooling as PyTorch's layers, and as ours."""
    plain = nn.Sequential(nn.ReLU(), nn.MaxPool2d(**{"kernel_size": 2, **options}))
    ours = copy.deepcopy(plain)
    ours[0].__class__, ours[1].__class__ = WaitingReLU, MaxPoolReLU2d
    return plain, ours


@pytest.mark.parametrize(("chunk", "small"), [(1, 0), (1000, 0), (2**21, 0), (1, 2**23)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", FORMATS)
def test_outputs_and_gradients_have_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, chunk: int, small: int, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    monkeypatch.setattr(pooling, "_CHUNK_VALUES", chunk)
    monkeypatch.setattr(pooling, "_SMALL", small)
    options = ({}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"ceil_mode": True}, {"dilation": (1, 2)})
    for each in options:
        plain, ours = pair(**each)
        # small integers: many maxima are tied, and many windows have nothing above 0
        values = torch.randint(-3, 3, (5, 8, 7, 9)).to(dtype).contiguous(memory_format=layout)
        found = []
        for network in (plain, ours):
            maps = values.clone(memory_format=torch.preserve_format).requires_grad_()
            output = network(maps)
            weights = torch.linspace(-2, 3, output.numel()).to(dtype).view(output.shape)
            output.backward(weights)
            found.append((output, maps.grad))
        for expected, got in zip(*found, strict=True):
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()


@pytest.mark.parametrize(("width", "dtype"), [(254, torch.uint8), (255, torch.int32)])
def test_a_window_is_told_by_a_byte_where_its_pixels_differ_in_it(width: int, dtype: torch.dtype) -> None:
    values = torch.rand(2, 3, 5, width)
    values[:, :, 1, 1] = 2  # the last pixel of the first window: width + 1 after its first
    saved, gradients = [], []
    for network in pair(padding=1, stride=1):
        maps = values.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each: saved.append(each) or each, lambda each: each
        ):
            output = network(maps)
        output.backward(torch.rand(output.shape, generator=torch.Generator().manual_seed(1)))
        gradients.append(maps.grad)
    assert dtype in {each.dtype for each in saved}
    assert torch.equal(*gradients)


def test_what_is_no_number_is_found_as_before() -> None:
    maps = torch.randn(2, 3, 4, 4)
    maps[1, 2, 3, 3] = torch.nan
    plain, ours = pair()
    expected, found = (network(maps.clone().requires_grad_()) for network in (plain, ours))
    assert torch.equal(found.isnan(), expected.isnan())
    assert int(found.isnan().sum()) == 1


def test_it_keeps_a_byte_for_each_maximum() -> None:
    kept = {}
    for name, network in zip(("plain", "ours"), pair(), strict=True):
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        maps = torch.randn(4, 8, 16, 16).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(maps * 1)
        kept[name] = sum(saved.values())
    pooled = 4 * 8 * 8 * 8
    assert kept["ours"] == pooled * (1 + 4)  # a place, and what ReLU keeps
    assert kept["plain"] >= pooled * (8 + 4 * 4)


def test_in_eval_mode_the_layers_are_pytorchs_and_only_pairs_change() -> None:
    config = ConvNetConfig(widths=(4, 4), blocks_per_stage=2)
    model = build_model(config, 10, image_size=16)
    names = [name for name, _ in model.named_modules()]
    images = torch.randn(3, 3, 16, 16)
    twin = copy.deepcopy(model).eval()
    pool_before_relu(model)
    changed = [name for name, layer in model.named_modules() if type(layer).__module__ == pooling.__name__]
    assert changed == ["stages.0.0.relu", "stages.0.pool", "stages.1.0.relu", "stages.1.pool"]
    assert [name for name, _ in model.named_modules()] == names
    with torch.no_grad():
        assert torch.equal(model.eval()(images), twin(images))
    for other in (ConvNetConfig(activation="gelu"), ConvNetConfig(pool="avg")):
        untouched = build_model(other.model_copy(update={"widths": (4,)}), 10, image_size=16)
        pool_before_relu(untouched)
        assert not any(type(layer).__module__ == pooling.__name__ for layer in untouched.modules())
    strange = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    pool_before_relu(strange)
    assert type(strange[0]) is nn.ReLU


@pytest.mark.parametrize("small", [0, 2**23])
def test_training_has_the_same_bits(tiny_config: Path, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr(pooling, "_SMALL", small)
    states = []
    for _ in range(2):
        run = Run.start(prepare(load_config(tiny_config)))
        run.model.train()
        for _, (images, labels) in zip(range(3), run.batches(), strict=False):
            training_step(run, images, labels)
        states.append((type(run.model.stages[0].pool), run.model.state_dict()))
        monkeypatch.setattr("bncli.training.run.pool_before_relu", lambda model: None)
    assert [kind for kind, _ in states] == [MaxPoolReLU2d, nn.MaxPool2d]
    assert all(torch.equal(value, states[1][1][name]) for name, value in states[0][1].items())
