import doctest

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bncli.determinism.certificate
import bncli.determinism.fixed_shape
from bncli.batchnorm.bits import bitwise_equal
from bncli.config import ConvNetConfig
from bncli.determinism import FixedShape, certify
from bncli.errors import BncliError
from bncli.models.convnet import build_model
from bncli.torchvision_compat import import_torchvision


class Shapes(nn.Module):
    """Each row's own sum, and a record of the batches that came."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Tensor] = []

    def forward(self, batch: Tensor) -> Tensor:
        self.batches.append(batch)
        return batch.flatten(1)[:, :2].clone()


@pytest.mark.parametrize(("count", "calls"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (11, 3)])
def test_every_batch_has_the_fixed_number_of_rows_and_only_the_real_ones_return(
    count: int, calls: int
) -> None:
    inner = Shapes().eval()
    images = torch.randn(count, 3, 2, 2)
    assert torch.equal(FixedShape(inner, rows=4)(images), images.flatten(1)[:, :2])
    assert [len(batch) for batch in inner.batches] == [4] * calls


def test_full_chunks_are_no_copies_and_padding_repeats_the_last_row() -> None:
    inner = Shapes().eval()
    images = torch.randn(6, 3, 2, 2)
    FixedShape(inner, rows=4)(images)
    assert inner.batches[0].data_ptr() == images.data_ptr()
    assert torch.equal(inner.batches[1], images[[4, 5, 5, 5]])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_padded_chunks_have_the_memory_format_of_full_ones(
    channels: int, memory_format: torch.memory_format
) -> None:
    """Kernels are chosen by it, also where, with a single channel, both formats are the same memory."""
    inner = Shapes().eval()
    FixedShape(inner, rows=4)(torch.empty(9, channels, 5, 5, memory_format=memory_format))
    assert len({batch.stride() for batch in inner.batches}) == 1


def test_no_images_give_no_rows() -> None:
    assert FixedShape(nn.Linear(3, 2).eval(), rows=4)(torch.empty(0, 3)).shape == (0, 2)


def test_it_takes_any_number_type_and_keeps_the_gradient() -> None:
    inner = Shapes().eval()
    assert FixedShape(inner, rows=4)(torch.arange(10).view(5, 2)).tolist() == [
        [2 * i, 2 * i + 1] for i in range(5)
    ]
    images = torch.randn(5, 3, requires_grad=True)
    FixedShape(nn.Linear(3, 1, bias=False).eval(), rows=2)(images).sum().backward()
    assert images.grad is not None
    assert images.grad.shape == (5, 3)


def test_train_mode_is_refused_also_of_one_module_inside() -> None:
    inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(BncliError, match=r"call eval\(\) first"):
        FixedShape(inner)(torch.randn(2, 3))
    wrapped = FixedShape(inner.eval(), rows=2)
    wrapped(torch.randn(2, 3))
    inner[1].train()
    with pytest.raises(BncliError, match="batch statistics"):
        wrapped(torch.randn(2, 3))
    wrapped.train()
    with pytest.raises(BncliError, match="eval mode"):
        wrapped(torch.randn(2, 3))
    assert wrapped.eval()(torch.randn(3, 3)).shape == (3, 3)


def test_wrapping_changes_no_mode_and_fewer_than_one_row_is_an_error() -> None:
    inner = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    inner[0].eval()
    assert FixedShape(inner).training
    assert [module.training for module in inner.modules()] == [True, False, True]
    assert not FixedShape(nn.Linear(1, 1).eval()).training
    with pytest.raises(ValueError, match="1 or more"):
        FixedShape(inner, rows=0)
    assert "rows=7" in repr(FixedShape(inner, rows=7))


def test_a_module_that_gives_another_number_of_rows_or_no_tensor_is_an_error() -> None:
    class Wrong(nn.Module):
        def __init__(self, output: object) -> None:
            super().__init__()
            self.output = output

        def forward(self, _: Tensor) -> object:
            return self.output

    for output, found in ((torch.zeros(3), r"got \(3,\)"), (torch.zeros(()), r"\(\)"), ([1], "got list")):
        with pytest.raises(BncliError, match=found):
            FixedShape(Wrong(output).eval(), rows=4)(torch.zeros(2, 3))


@st.composite
def trained_networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Random networks as bncli trains them, odd widths included, and images for them."""
    config = ConvNetConfig(
        widths=draw(st.lists(st.integers(1, 24), min_size=1, max_size=3)),
        blocks_per_stage=draw(st.integers(1, 2)),
        pool=draw(st.sampled_from(["max", "avg"])),
        head_pool=draw(st.sampled_from(["max", "avg"])),
        whitening=draw(st.booleans()),
    )
    side, seed = draw(st.sampled_from([9, 12, 15])), draw(st.integers(0, 2**31))
    net = build_model(config, draw(st.integers(2, 12)), image_size=side, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (draw(st.integers(1, 40)), 3, side, side), generator=generator)
    return _with_running_statistics(net, seed), images.byte()


@st.composite
def any_networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Random Conv-BN networks with kernels, strides, groups and activations that bncli has not."""
    seed = draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    channels = first = draw(st.sampled_from([1, 3]))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([1, 2])) if channels % 2 == 0 else 1
        width, kernel, stride = (
            2 * draw(st.integers(1, 12)),
            draw(st.sampled_from([1, 3])),
            draw(st.integers(1, 2)),
        )
        layers.append(nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups))
        layers += [
            nn.BatchNorm2d(width, affine=draw(st.booleans())),
            draw(st.sampled_from([nn.ReLU(), nn.GELU()])),
        ]
        channels = width
    net = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, draw(st.integers(2, 12)))
    )
    side = draw(st.sampled_from([4, 7, 8]))
    return _with_running_statistics(net, seed), torch.randn(draw(st.integers(1, 20)), first, side, side)


def _with_running_statistics(net: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, generator=generator)
            nn.init.uniform_(module.running_var, 0.1, 3, generator=generator)
    return net.eval()


def check_every_cut_and_order(net: nn.Module, images: Tensor, rows: int, data: st.DataObject) -> None:
    count = len(images)
    if data.draw(st.booleans(), "channels_last"):
        net, images = net.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    order = torch.tensor(data.draw(st.permutations(range(count)), "order"))
    cuts = data.draw(st.lists(st.integers(0, count), max_size=4).map(sorted), "cuts")
    pieces = [order[i:j] for i, j in zip([0, *cuts], [*cuts, count], strict=True) if j > i]
    low_precision = data.draw(st.booleans(), "bfloat16")
    model = FixedShape(net, rows)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        together, plain = model(images), net(images)
        alone = torch.cat([model(image[None]) for image in images])
        shuffled = torch.empty_like(together)
        for piece in pieces:
            shuffled[piece] = model(images[piece])
    assert bitwise_equal(alone, together)
    assert bitwise_equal(shuffled, together)
    tolerance = (0.1 if low_precision else 1e-4) * max(1.0, float(plain.abs().max()))
    assert torch.allclose(together.float(), plain.float(), atol=tolerance)


@given(pair=trained_networks(), rows=st.integers(1, 20), data=st.data())
@settings(max_examples=60, deadline=None)
def test_in_any_cut_and_order_a_network_of_bncli_gives_every_image_the_same_bits(
    pair: tuple[nn.Module, Tensor], rows: int, data: st.DataObject
) -> None:
    check_every_cut_and_order(*pair, rows, data)


@given(pair=any_networks(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_with_one_row_any_network_gives_every_image_the_same_bits(
    pair: tuple[nn.Module, Tensor], data: st.DataObject
) -> None:
    """One row leaves a kernel nothing to treat differently; with more, some treat rows by their address."""
    check_every_cut_and_order(*pair, 1, data)


@given(pair=trained_networks(), rows=st.integers(2, 16))
@settings(max_examples=20, deadline=None)
def test_what_the_padding_holds_does_not_matter(pair: tuple[nn.Module, Tensor], rows: int) -> None:
    net, images = pair
    images = images[:rows]
    zeros = F.pad(images, (0, 0, 0, 0, 0, 0, 0, rows - len(images)))
    with torch.no_grad():
        assert bitwise_equal(FixedShape(net, rows)(images), net(zeros)[: len(images)])


def test_a_batch_at_an_odd_address_is_moved_to_one_that_kernels_like() -> None:
    inner = Shapes().eval()
    FixedShape(inner, rows=4)(torch.randn(9, 3)[1:5])
    assert inner.batches[0].data_ptr() % 64 == 0


def test_a_single_image_cut_out_of_a_channels_last_batch_keeps_that_format() -> None:
    """Its first stride is another, by which PyTorch would take it for contiguous."""
    images = torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    inner = Shapes().eval()
    FixedShape(inner, rows=1)(images)
    FixedShape(inner, rows=1)(images[0][None])  # at an address like any other
    assert len({batch.stride() for batch in inner.batches}) == 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_networks_that_bncli_trains_keep_all_four_claims(precision: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)  # conftest sets it back
    # few passes: beside a busy process two threads that wait for each other are many times slower
    net = build_model(ConvNetConfig(widths=(16, 30), blocks_per_stage=1), 10, image_size=16)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        net.train()(images)
    model = FixedShape(net, rows=4).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        found = certify(model, images.to(memory_format=torch.channels_last), batch_sizes=(3, 6))
    assert found.bitwise_equal
    assert found.train_mode.max_abs_diff > 0.01
    assert found.running_stats_unchanged


@pytest.mark.parametrize("module", [bncli.determinism.certificate, bncli.determinism.fixed_shape])
def test_the_examples_on_a_torchvision_resnet_are_true(module: object) -> None:
    import_torchvision()  # so that the examples' plain `from torchvision...` works beside a CPU-only torch
    results = doctest.testmod(module)
    assert results.attempted > 4
    assert results.failed == 0
